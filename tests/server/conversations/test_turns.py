"""Turns: one at a time in a conversation, visible when ended, once per idempotency key, ended after a crash."""

from __future__ import annotations

import asyncio
import random

import pytest

from server.conversations.errors import Conflict, ConversationBusy, IdempotencyMismatch, NotFound, TurnLost
from server.conversations.store import Store
from server.conversations.tables import TurnRow
from server.conversations.values import Idempotency, Message, RunningTurn, Turn, Usage
from tests.server.conversations.conftest import OWNER
from tests.server.conversations.test_store import exchange, values

pytestmark = pytest.mark.anyio


async def begin(store: Store, question: str, **more: object) -> RunningTurn:
    turn = await store.begin_turn(OWNER, [Message("human", question)], **more)  # type: ignore[arg-type]
    assert isinstance(turn, RunningTurn)
    return turn


async def leave_behind(url: str, question: str, sent: str = "", **more: object) -> RunningTurn:
    """Begin a turn in a store that then vanishes as a killed process does, with `sent` saved."""
    store = Store(url, lease_seconds=0.6, checkpoint_seconds=0.05)
    await store.open()
    turn = await begin(store, question, **more)
    if sent:
        turn.sent(sent)
        await asyncio.sleep(0.3)
    store._keeper.running.clear()
    await store.close()
    return turn


async def test_a_turn_is_kept_with_all_that_is_known_of_it(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "كم؟", conversation_id=made.id, metadata={"a": "b"}, details={"temperature": 0.5})
    assert turn.response_id.startswith("resp_")
    assert turn.message_id.startswith("msg_")
    assert turn.waited == 0
    turn.language, turn.checkpoint = "ar", "v7"
    turn.details["top_p"] = 1
    ended = await store.finish_turn(turn, "خمسة", usage=Usage(7, 3, 2))
    assert await store.get_turn(OWNER, turn.response_id) == ended
    assert ended.reply is not None
    assert (ended.status, ended.reply.value, ended.reply.status) == ("complete", "خمسة", "completed")
    assert (ended.language, ended.checkpoint, ended.usage) == ("ar", "v7", Usage(7, 3, 2))
    assert (ended.metadata, ended.details) == ({"a": "b"}, {"temperature": 0.5, "top_p": 1})
    assert ended.created_at <= ended.ended_at
    page = await store.list_input_items(OWNER, turn.response_id)
    assert [item.value for item in page.items] == ["كم؟"]


async def test_a_running_turn_is_seen_by_nobody(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "a", conversation_id=made.id)
    assert await values(store, made.id) == []
    for call in (
        store.get_turn(OWNER, turn.response_id),
        store.get_item(OWNER, made.id, turn.message_id),
        store.list_input_items(OWNER, turn.response_id),
        store.begin_turn(OWNER, [Message("human", "x")], previous_response_id=turn.response_id),
    ):
        with pytest.raises(NotFound):
            await call
    assert [record async for record in store.export()] == []
    await store.finish_turn(turn, "b")
    assert await values(store, made.id) == ["a", "b"]


async def test_an_interrupted_turn_keeps_what_was_sent(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "a", conversation_id=made.id)
    turn.sent("one ")
    turn.sent("two")
    await store.interrupt_turn(turn)
    await store.interrupt_turn(turn)
    page = await store.list_items(OWNER, made.id)
    assert [(item.value, item.status) for item in page.items] == [("one two", "incomplete"), ("a", "completed")]
    with pytest.raises(TurnLost):
        await store.finish_turn(turn, "one two three")
    assert (await store.get_turn(OWNER, turn.response_id)).status == "incomplete"


async def test_interrupting_a_finished_turn_changes_nothing(store: Store) -> None:
    turn = await begin(store, "a")
    await store.finish_turn(turn, "b")
    await store.interrupt_turn(turn)
    assert (await store.get_turn(OWNER, turn.response_id)).status == "complete"


async def test_a_failed_turn_is_no_part_of_the_conversation(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "a", conversation_id=made.id)
    await store.fail_turn(turn)
    assert await values(store, made.id) == []
    assert (await store.get_turn(OWNER, turn.response_id)).status == "failed"
    assert (await begin(store, "b", conversation_id=made.id)).history == ()


async def test_history_is_what_came_before(store: Store) -> None:
    made = await store.create_conversation(OWNER, items=[Message("system", "s")])
    for n in range(3):
        await exchange(store, made.id, f"q{n}", f"a{n}")
    turn = await begin(store, "now", conversation_id=made.id)
    texts = [[i.value for i in (*t.inputs, *([t.reply] if t.reply else []))] for t in turn.history]
    assert texts == [["s"], ["q0", "a0"], ["q1", "a1"], ["q2", "a2"]]


async def test_responses_chain_and_branch(store: Store) -> None:
    first = await exchange(store, None, "1", "a")
    second = await exchange(store, None, "2", "b", previous_response_id=first)
    left, right = await asyncio.gather(*(begin(store, "3", previous_response_id=second) for _ in range(2)))
    for turn in (left, right):
        assert [old.inputs[0].value for old in turn.history] == ["1", "2"]
        await store.finish_turn(turn, "c")
    await store.delete_turn(OWNER, second)
    turn = await begin(store, "4", previous_response_id=left.response_id)
    assert [old.inputs[0].value for old in turn.history] == ["1", "3"]
    with pytest.raises(ValueError, match="not both"):
        await begin(store, "x", previous_response_id=first, conversation_id="conv_x")


async def test_a_second_turn_waits_and_then_is_refused(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "a", conversation_id=made.id)
    with pytest.raises(ConversationBusy) as caught:
        await begin(store, "b", conversation_id=made.id, wait=0.3)
    assert 0.3 <= caught.value.waited < 2
    with pytest.raises(ConversationBusy):
        await store.add_items(OWNER, made.id, [Message("human", "x")], wait=0)
    waiting = asyncio.create_task(begin(store, "c", conversation_id=made.id))
    await asyncio.sleep(0.2)
    await store.finish_turn(turn, "done")
    second = await waiting
    assert second.waited > 0.1
    assert [old.inputs[0].value for old in second.history] == ["a"]


async def test_the_database_itself_refuses_a_second_running_turn(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    await begin(store, "a", conversation_id=made.id)
    row = TurnRow(owner=OWNER, status="in_progress", conversation_number=1, created_at=0, labels={}, details={})

    async def insert() -> None:
        async with store.database.write() as session:
            session.add(row)

    with pytest.raises(Conflict):
        await insert()


async def test_races_on_one_conversation_never_interleave(url: str) -> None:
    """Two processes' stores, sixteen clients, one conversation: whole turns, one after the other."""
    async with Store(url) as left, Store(url) as right:
        made = await left.create_conversation(OWNER)

        async def talk(store: Store, name: str) -> None:
            for n in range(3):
                turn = await begin(store, f"{name}.{n}?", conversation_id=made.id, wait=60)
                for word in ("yes ", name):
                    turn.sent(word)
                    await asyncio.sleep(random.uniform(0, 0.01))
                await store.finish_turn(turn, f"{name}.{n}!")
                if n == 1:
                    await store.add_items(
                        OWNER, made.id, [Message("human", f"{name}+?"), Message("gpt", f"{name}+!")], wait=60
                    )

        await asyncio.gather(*(talk(random.choice([left, right]), f"c{n}") for n in range(8)))
        found = await values(left, made.id)
    assert len(found) == len(set(found)) == 8 * 4 * 2
    for question, answer in zip(found[::2], found[1::2], strict=True):
        assert question[:-1] == answer[:-1]
        assert question[-1] + answer[-1] == "?!"


async def test_an_idempotency_key_gives_the_first_result(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    key = Idempotency("\0key", "body")
    turn = await begin(store, "a", conversation_id=made.id, idempotency=key)
    with pytest.raises(ConversationBusy):
        await begin(store, "a", conversation_id=made.id, idempotency=key, wait=0)
    waiting = asyncio.create_task(
        store.begin_turn(OWNER, [Message("human", "a")], conversation_id=made.id, idempotency=key)
    )
    first = await store.finish_turn(turn, "b")
    assert await waiting == first
    with pytest.raises(IdempotencyMismatch):
        await begin(store, "z", conversation_id=made.id, idempotency=Idempotency("\0key", "other"))
    assert await values(store, made.id) == ["a", "b"]


async def test_one_key_at_the_same_time_makes_one_turn(store: Store) -> None:
    async def ask(n: int) -> str | None:
        turn = await store.begin_turn(OWNER, [Message("human", "a")], idempotency=Idempotency("k", "b"), wait=30)
        if isinstance(turn, Turn):
            return turn.response_id
        await asyncio.sleep(0.05)
        return (await store.finish_turn(turn, f"b{n}")).response_id

    assert len(set(await asyncio.gather(*map(ask, range(8))))) == 1
    assert (await store.count())["complete"] == 1


async def test_a_key_whose_turn_failed_may_try_again(store: Store) -> None:
    key = Idempotency("k", "b")
    turn = await begin(store, "a", idempotency=key)
    await store.fail_turn(turn)
    second = await begin(store, "a", idempotency=key)
    await store.finish_turn(second, "b")
    with pytest.raises(NotFound):
        await store.get_turn(OWNER, turn.response_id)


async def test_a_dead_turn_frees_its_conversation_when_its_lease_ends(url: str) -> None:
    async with Store(url, checkpoint_seconds=60) as store:
        made = await store.create_conversation(OWNER)
        dead = await leave_behind(url, "a", "one two", conversation_id=made.id)
        with pytest.raises(ConversationBusy):
            await begin(store, "b", conversation_id=made.id, wait=0)
        turn = await begin(store, "b", conversation_id=made.id)
        assert turn.waited > 0
        (old,) = turn.history
        assert old.reply is not None
        assert (old.status, old.reply.value, old.reply.status) == ("incomplete", "one two", "incomplete")
        with pytest.raises(TurnLost):
            await store.finish_turn(dead, "one two three")


async def test_the_keeper_ends_dead_turns_by_itself(url: str) -> None:
    dead = await leave_behind(url, "a")
    async with Store(url, checkpoint_seconds=0.1) as store:
        await asyncio.sleep(1.0)
        turn = await store.get_turn(OWNER, dead.response_id)
        assert (turn.status, turn.reply and turn.reply.value) == ("incomplete", "")


async def test_a_key_whose_process_died_before_sending_may_try_again(url: str) -> None:
    async with Store(url) as store:
        made = await store.create_conversation(OWNER)
        key = Idempotency("k", "b")
        await leave_behind(url, "a", conversation_id=made.id, idempotency=key)
        turn = await begin(store, "a", conversation_id=made.id, idempotency=key)
        await store.finish_turn(turn, "b")
        assert await values(store, made.id) == ["a", "b"]


async def test_a_living_turn_outlasts_its_lease(url: str) -> None:
    async with Store(url, lease_seconds=0.3, checkpoint_seconds=0.05) as store:
        made = await store.create_conversation(OWNER)
        turn = await begin(store, "a", conversation_id=made.id)
        await asyncio.sleep(1.0)
        assert (await store.finish_turn(turn, "b")).status == "complete"


async def test_a_dropped_handle_frees_its_conversation(url: str) -> None:
    async with Store(url, lease_seconds=0.3, checkpoint_seconds=0.05) as store:
        made = await store.create_conversation(OWNER)
        await begin(store, "a", conversation_id=made.id)
        await begin(store, "b", conversation_id=made.id)


async def test_closing_ends_running_turns(url: str) -> None:
    async with Store(url) as store:
        turn = await begin(store, "a")
        turn.sent("so far")
    async with Store(url) as store:
        ended = await store.get_turn(OWNER, turn.response_id)
        assert (ended.status, ended.reply and ended.reply.value) == ("incomplete", "so far")


async def test_a_deleted_conversation_ends_its_running_turn(store: Store) -> None:
    made = await store.create_conversation(OWNER)
    turn = await begin(store, "a", conversation_id=made.id)
    await store.delete_conversation(OWNER, made.id)
    with pytest.raises(TurnLost):
        await store.finish_turn(turn, "b")
    await store.interrupt_turn(turn)
    assert (await store.count())["conversations"] == 0


async def test_cancelled_requests_leave_the_store_whole(url: str) -> None:
    """Cancelled at any moment, again and again as servers do: the conversation is free and holds whole turns."""
    async with Store(url) as store:
        made = await store.create_conversation(OWNER)

        async def ask(n: int) -> None:
            turn = await begin(store, f"{n}?", conversation_id=made.id, wait=30)
            try:
                turn.sent("partial")
                await asyncio.sleep(0.005)
                await store.finish_turn(turn, f"{n}!")
            finally:
                await store.interrupt_turn(turn)

        for n in range(40):
            task = asyncio.create_task(ask(n))
            await asyncio.sleep(random.uniform(0, 0.05))
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(task, return_exceptions=True)
        last = await begin(store, "last?", conversation_id=made.id, wait=2)
        await store.finish_turn(last, "last!")
        for turn in last.history:
            assert turn.reply is not None
            expected = turn.inputs[0].value[:-1] + "!" if turn.status == "complete" else "partial"
            assert turn.reply.value == expected
    assert store._keeper.owed == set()
