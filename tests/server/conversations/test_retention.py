"""What has outlived its time is gone from every answer at once, and from the disk soon after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.conversations.errors import NotFound
from server.conversations.store import Store
from server.conversations.values import Idempotency, Message
from tests.server.conversations.conftest import OWNER
from tests.server.conversations.test_store import exchange, values
from tests.server.conversations.test_turns import begin

pytestmark = pytest.mark.anyio
MARKER = "سر المريض 8f1c2d"


def on_disk(store: Store) -> bool:
    """Whether the marker stands in any file of a SQLite store."""
    path = Path(store.database.url.database or "")
    return any(
        MARKER.encode() in file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name)
    )


async def test_a_conversation_outlives_its_time_to_live_with_each_turn(url: str) -> None:
    async with Store(url) as store:
        made = await store.create_conversation(OWNER, ttl=0.8)
        assert made.expires_at == made.created_at + 0.8
        await asyncio.sleep(0.5)
        response = await exchange(store, made.id, "a", "b")
        await asyncio.sleep(0.5)
        assert await values(store, made.id) == ["a", "b"]
        await asyncio.sleep(0.5)
        for call in (
            store.get_conversation(OWNER, made.id),
            store.list_items(OWNER, made.id),
            store.get_turn(OWNER, response),
            store.begin_turn(OWNER, [Message("human", "c")], conversation_id=made.id),
            store.begin_turn(OWNER, [Message("human", "c")], previous_response_id=response),
        ):
            with pytest.raises(NotFound):
                await call
        assert [record async for record in store.export()] == []


async def test_the_store_limit_holds_for_all(url: str) -> None:
    async with Store(url, conversation_ttl=0.4) as store:
        made = await store.create_conversation(OWNER, ttl=3600)
        assert made.expires_at == made.created_at + 0.4
        response = await exchange(store, None, "a", "b")
        await asyncio.sleep(0.6)
        with pytest.raises(NotFound):
            await store.get_conversation(OWNER, made.id)
        with pytest.raises(NotFound):
            await store.get_turn(OWNER, response)
        purged = await store.purge()
        assert purged == (1, 1)


async def test_the_keeper_deletes_what_expired(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.conversations.keeper.EXPIRY_SECONDS", 0.1)
    async with Store(url, conversation_ttl=0.3, checkpoint_seconds=0.05) as store:
        made = await store.create_conversation(OWNER)
        await exchange(store, made.id, MARKER, "b")
        await exchange(store, None, MARKER, "b", idempotency=Idempotency("k", "b"))
        await asyncio.sleep(1.0)
        assert set((await store.count()).values()) == {0}
        assert not (store.database.is_sqlite and on_disk(store))


@pytest.mark.parametrize("what", ["conversation", "response", "item"])
async def test_deleted_text_leaves_the_disk(tmp_path: Path, what: str) -> None:
    async with Store(f"sqlite:///{tmp_path / 'c.db'}", checkpoint_seconds=0.05) as store:
        made = await store.create_conversation(OWNER)
        for n in range(20):
            await exchange(store, made.id, "q", f"filler {n} " * 50)
        response = await exchange(store, made.id, MARKER, "kept")
        for n in range(20):
            await exchange(store, made.id, "q", f"filler {n} " * 50)
        assert on_disk(store)
        if what == "conversation":
            await store.delete_conversation(OWNER, made.id)
        elif what == "response":
            await store.delete_turn(OWNER, response)
        else:
            item = (await store.list_input_items(OWNER, response)).items[0]
            await store.delete_item(OWNER, made.id, item.id)
        await asyncio.sleep(0.4)
        assert not on_disk(store)


async def test_purge_deletes_the_idle_and_keeps_the_rest(store: Store) -> None:
    old = await store.create_conversation(OWNER)
    await exchange(store, old.id, MARKER, "b")
    running = await begin(store, "a")
    await asyncio.sleep(0.6)
    new = await store.create_conversation(OWNER)
    assert await store.purge(older_than=0.5) == (1, 0)
    assert (await store.get_conversation(OWNER, new.id)).id == new.id
    await store.finish_turn(running, "b")
    if store.database.is_sqlite:
        assert not on_disk(store)
