"""Conversations and their items: kept, paged, changed, deleted, and seen by their owner only."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.conversations.errors import IdempotencyMismatch, NotFound
from server.conversations.store import Store
from server.conversations.values import Idempotency, Message, RunningTurn, Usage, new_id
from tests.server.conversations.conftest import OWNER

pytestmark = pytest.mark.anyio


async def exchange(store: Store, conversation_id: str | None, question: str, answer: str, **more: object) -> str:
    """One complete turn; returns its response id."""
    turn = await store.begin_turn(OWNER, [Message("human", question)], conversation_id=conversation_id, **more)  # type: ignore[arg-type]
    assert isinstance(turn, RunningTurn)
    turn.language, turn.checkpoint = "en", "v1"
    await store.finish_turn(turn, answer, usage=Usage(3, 2))
    return turn.response_id


async def values(store: Store, conversation_id: str) -> list[str]:
    page = await store.list_items(OWNER, conversation_id, order="asc", limit=100)
    return [item.value for item in page.items]


async def test_a_conversation_keeps_its_metadata(store: Store) -> None:
    made = await store.create_conversation(OWNER, metadata={"ward": "٣"})
    assert made.id.startswith("conv_")
    assert len(made.id) == 53
    assert await store.get_conversation(OWNER, made.id) == made
    changed = await store.update_conversation(OWNER, made.id, {"ward": "4"})
    assert (changed.metadata, changed.created_at) == ({"ward": "4"}, made.created_at)
    assert (await store.get_conversation(OWNER, made.id)).metadata == {"ward": "4"}


@pytest.mark.parametrize("metadata", [{str(n): "" for n in range(17)}, {"k" * 65: ""}, {"k": "v" * 513}, {"k": 1}])
async def test_metadata_keeps_to_openai_limits(store: Store, metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="metadata"):
        await store.create_conversation(OWNER, metadata=metadata)


async def test_items_are_paged_in_both_orders(store: Store) -> None:
    first = [Message("system", "0"), *(Message("human" if n % 2 else "gpt", str(n)) for n in range(1, 4))]
    made = await store.create_conversation(OWNER, items=first)
    added = await store.add_items(OWNER, made.id, [Message("human", "4")])
    await exchange(store, made.id, "5", "6")
    assert [item.value for item in added] == ["4"]
    assert await values(store, made.id) == list("0123456")
    for order, expected in (("asc", "0123456"), ("desc", "6543210")):
        seen, after, more = "", None, True
        while more:
            page = await store.list_items(OWNER, made.id, after=after, limit=3, order=order)  # type: ignore[arg-type]
            seen += "".join(item.value for item in page.items)
            after, more = page.items[-1].id, page.has_more
        assert seen == expected
    assert (await store.list_items(OWNER, made.id, after=added[0].id, limit=1)).items[0].value == "3"


async def test_an_item_is_found_and_deleted(store: Store) -> None:
    made = await store.create_conversation(OWNER, items=[Message("human", "a"), Message("gpt", "b")])
    item = (await store.list_items(OWNER, made.id)).items[0]
    assert await store.get_item(OWNER, made.id, item.id) == item
    assert (await store.delete_item(OWNER, made.id, item.id)).id == made.id
    assert await values(store, made.id) == ["a"]
    with pytest.raises(NotFound):
        await store.get_item(OWNER, made.id, item.id)
    with pytest.raises(NotFound):
        await store.list_items(OWNER, made.id, after=item.id)


async def test_other_owners_see_what_unknown_ids_show(store: Store) -> None:
    made = await store.create_conversation(OWNER, items=[Message("human", "a")])
    response = await exchange(store, made.id, "b", "c")
    item = (await store.list_items(OWNER, made.id)).items[0]
    for conversation, reply, one in ((made.id, response, item.id), (new_id("conv"), new_id("resp"), new_id("msg"))):
        for call in (
            store.get_conversation("other", conversation),
            store.update_conversation("other", conversation, {}),
            store.delete_conversation("other", conversation),
            store.list_items("other", conversation),
            store.add_items("other", conversation, [Message("human", "x")]),
            store.get_item("other", conversation, one),
            store.delete_item("other", conversation, one),
            store.begin_turn("other", [Message("human", "x")], conversation_id=conversation),
            store.begin_turn("other", [Message("human", "x")], previous_response_id=reply),
            store.get_turn("other", reply),
            store.delete_turn("other", reply),
            store.list_input_items("other", reply),
        ):
            with pytest.raises(NotFound) as caught:
                await call
            assert str(caught.value).startswith("no such ")
    own = await store.create_conversation("other")
    with pytest.raises(NotFound):
        await store.get_item("other", own.id, item.id)
    assert await values(store, made.id) == ["a", "b", "c"]


@pytest.mark.parametrize("strange", ["", "conv_", "conv_\0", "' OR 1=1 --", "conv_" + "0" * 47 + "٣", "x" * 10_000])
async def test_what_is_no_id_is_not_found(store: Store, strange: str) -> None:
    with pytest.raises(NotFound):
        await store.get_conversation(OWNER, strange)
    with pytest.raises(NotFound):
        await store.get_turn(OWNER, strange)


async def test_lookups_use_the_owner_index(store: Store) -> None:
    """A foreign id must miss in the index like an unknown one: no plan may look an id up on its own."""
    made = await store.create_conversation(OWNER)
    if not store.database.is_sqlite:
        return
    async with store.database.read() as session:
        connection = await session.connection()
        for table, column in (("conversations", "id"), ("turns", "response_id")):
            plan = await connection.exec_driver_sql(
                f"EXPLAIN QUERY PLAN SELECT * FROM {table} WHERE owner = ? AND {column} = ?", ("x", made.id)
            )
            assert f"{table}_by_owner (owner=? AND {column}=?)" in str(plan.all())


async def test_deleting_a_conversation_deletes_its_responses(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    response = await exchange(store, made.id, "a", "b")
    fork = await exchange(store, None, "c", "d", previous_response_id=response)
    await store.delete_conversation(OWNER, made.id)
    with pytest.raises(NotFound):
        await store.get_conversation(OWNER, made.id)
    with pytest.raises(NotFound):
        await store.get_turn(OWNER, response)
    turn = await store.begin_turn(OWNER, [Message("human", "e")], previous_response_id=fork)
    assert isinstance(turn, RunningTurn)
    assert [item.value for old in turn.history for item in old.inputs] == ["c"]


async def test_creating_is_idempotent(store: Store) -> None:
    key = Idempotency("key", "body")
    made = await store.create_conversation(OWNER, items=[Message("human", "a")], idempotency=key)
    again = await store.create_conversation(OWNER, items=[Message("human", "a")], idempotency=key)
    assert made == again
    assert (await store.count())["conversations"] == 1
    with pytest.raises(IdempotencyMismatch):
        await store.create_conversation(OWNER, idempotency=Idempotency("key", "other body"))
    assert (await store.create_conversation("other", idempotency=key)).id != made.id
    append = Idempotency("append", "body")
    for _ in range(2):
        await store.add_items(OWNER, made.id, [Message("human", "b")], idempotency=append)
    assert await values(store, made.id) == ["a", "b"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=3), label=st.text(max_size=64))
async def test_any_text_comes_back_as_it_was(store: Store, texts: list[str], label: str) -> None:
    made = await store.create_conversation(
        OWNER, metadata={label: label}, items=[Message("human", text) for text in texts]
    )
    await exchange(store, made.id, texts[0], texts[-1], idempotency=Idempotency(label + made.id, "x"))
    assert await values(store, made.id) == [*texts, texts[0], texts[-1]]
    assert (await store.get_conversation(OWNER, made.id)).metadata == {label: label}


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "\udfff!", "\u202eدوخة\u0000", "🩺" * 5000, "\\u0000"])
async def test_awkward_text_comes_back_as_it_was(store: Store, text: str) -> None:
    made = await store.create_conversation(OWNER)
    response = await exchange(store, made.id, text, text)
    turn = await store.get_turn(OWNER, response)
    assert turn.reply is not None
    assert (turn.inputs[0].value, turn.reply.value) == (text, text)
