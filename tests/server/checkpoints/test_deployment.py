"""What replicas agree on, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import event, update

from server.checkpoints import deployment as module
from server.checkpoints.activate import Catalogue
from server.checkpoints.deployment import Busy, Deployment, Place, in_share
from server.checkpoints.registry import Registry
from server.checkpoints.replica import read_note, starting_point, write_note
from server.checkpoints.serving import read_serving
from server.checkpoints.tables import ReplicaRow
from server.conversations.database import Database
from server.conversations.errors import StoreUnavailable
from server.settings import EMBEDDED_CHECKPOINT
from tests.conftest import EMBEDDED_ID
from tests.server.checkpoints.twin import make
from tests.server.conversations.conftest import anyio_backend, postgres, url

__all__ = ["anyio_backend", "postgres", "url"]

pytestmark = pytest.mark.anyio
BASE = EMBEDDED_ID


@pytest.fixture
async def deployment(url: str) -> AsyncIterator[Deployment]:
    made = Deployment(Database(url))
    yield made
    await made.database.dispose()


async def beat(deployment: Deployment, id: str, checkpoint: str = "a") -> None:
    await deployment.beat(id, checkpoint, "serving", None, "")


async def test_one_holds_it_and_the_next_is_told_who(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await deployment.take("amal", "activate a")
    with pytest.raises(Busy, match="amal is at it: activate a"):
        await deployment.take("badr", "activate b")
    assert (await deployment.wanted()).busy_who == "amal"
    await deployment.release(token)
    monkeypatch.setattr(module, "BUSY_SECONDS", -1.0)
    dead = await deployment.take("carim", "activate c")
    token = await deployment.take("badr", "activate b")
    for attempt in (deployment.want(dead, "c", "a"), deployment.keep(dead)):
        with pytest.raises(Busy, match="taken over by badr"):
            await attempt
    await deployment.release(dead)
    assert await deployment.want(token, "b", "a") == 1


async def test_changes_are_numbered_and_a_canary_ends(deployment: Deployment) -> None:
    for replica in ("r1", "r2", "r3"):
        await beat(deployment, replica)
    token = await deployment.take("amal", "canary")
    assert await deployment.want_canary(token, "b", 0.3, ["r2"], "a") == 1
    wanted = await deployment.wanted()
    assert (wanted.target(True), wanted.target(False), wanted.share) == ("b", "a", 0.3)
    assert [one.canary for one in await deployment.replicas()] == [False, True, False]
    assert await deployment.end_canary(token) == 2
    assert (await deployment.wanted()).target(True) == "a"
    assert await deployment.want(token, "b", "a") == 3
    wanted = await deployment.wanted()
    assert (wanted.desired, wanted.previous, wanted.candidate) == ("b", "a", None)


async def test_so_many_change_at_once_and_the_dead_lose_their_turn(deployment: Deployment) -> None:
    names = [f"r{n}" for n in range(6)]
    for name in names:
        await beat(deployment, name)
    given = await asyncio.gather(*(deployment.take_turn(name, 2) for name in names))
    assert sum(given) == 2
    first = names[given.index(True)]
    assert await deployment.take_turn(first, 2)
    await deployment.end_turn(first)
    others = [name for name, got in zip(names, given, strict=True) if not got]
    assert await deployment.take_turn(others[0], 2)
    assert not await deployment.take_turn(others[1], 2)
    async with deployment.database.write() as session:
        await session.execute(update(ReplicaRow).values(turn_until=1.0))
    assert await deployment.take_turn(others[1], 2)


async def test_a_silent_replica_is_not_alive(deployment: Deployment) -> None:
    await beat(deployment, "r1")
    await beat(deployment, "r2")
    async with deployment.database.write() as session:
        late = ReplicaRow.heartbeat_at - module.ALIVE_SECONDS - 60
        await session.execute(update(ReplicaRow).where(ReplicaRow.id == "r1").values(heartbeat_at=late))
    assert [one.alive for one in await deployment.replicas()] == [False, True]
    await deployment.leave("r2")
    assert [one.id for one in await deployment.replicas()] == ["r1"]


async def test_actions_are_written_down(deployment: Deployment) -> None:
    first = await deployment.begin_action("amal", "activate", "b", "r1")
    second = await deployment.begin_action("badr", "abort", None, "r2")
    await deployment.end_action(first, "rolled_back", "it did not pass")
    newest, oldest = await deployment.audit(10, None)
    assert (newest["who"], newest["what"], newest["result"], newest["ended_at"]) == ("badr", "abort", None, None)
    assert (oldest["result"], oldest["message"], oldest["replica"]) == ("rolled_back", "it did not pass", "r1")
    assert oldest["ended_at"] >= oldest["begun_at"]
    assert [one["number"] for one in await deployment.audit(10, second)] == [first]


async def test_adapters_are_remembered_and_so_is_their_removal(deployment: Deployment) -> None:
    assert await deployment.adapters() == {}
    first, second = Place(Path("/a/1"), "skin@1"), Place(Path("/a/2"), "skin@2")
    for place in (first, second, None, first):
        await deployment.want_adapter("skin", place)
        assert await deployment.adapters() == {"skin": place}


def test_the_share_is_sticky_and_grows() -> None:
    names = [f"conv_{n:048x}" for n in range(4000)]
    small = {name for name in names if in_share(name, 0.1)}
    assert 300 < len(small) < 500
    assert small < {name for name in names if in_share(name, 0.5)}
    assert not any(in_share(name, 0.0) for name in names)


# --- where a start begins ---------------------------------------------------------------------------------------


async def start(root: Path, deployment: Deployment) -> str:
    return (await starting_point(Catalogue(Registry(root), read_serving(str(EMBEDDED_CHECKPOINT))), deployment)).id


async def want(deployment: Deployment, desired: str, previous: str) -> None:
    token = await deployment.take("amal", "activate")
    await deployment.want(token, desired, previous)
    await deployment.release(token)


async def test_a_start_takes_what_is_wanted_or_what_was_before(deployment: Deployment, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    make(root, "one")
    two = make(root, "two")
    assert await start(root, deployment) == BASE
    await want(deployment, "two", "one")
    assert await start(root, deployment) == "two"
    shard = two / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert await start(root, deployment) == "one"
    await want(deployment, "gone", "gone-too")
    assert await start(root, deployment) == BASE
    await want(deployment, BASE, "one")
    assert await start(root, deployment) == BASE


async def test_without_a_database_a_start_goes_by_the_note(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    make(root, "one")
    away = Deployment(Database(f"postgresql://u@/d?host={tmp_path}"))
    assert await start(root, away) == BASE
    write_note(root, "one")
    assert await start(root, away) == "one"
    write_note(root, "gone")
    assert await start(root, away) == BASE
    for spoiled in ('{"id": 3}', "{", "[]"):
        (root / ".last-good.json").write_text(spoiled)
        assert read_note(root) is None
    assert Registry(root).ids() == ["one"]


def test_a_note_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_note(tmp_path / "nowhere", "one")
    assert "keeps no note of one" in caplog.text


async def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    limit = [2**30]
    deployment = Deployment(Database(f"sqlite:///{tmp_path / 'c.db'}"))

    @event.listens_for(deployment.database.engine.sync_engine, "checkout")
    def restrict(connection: object, *_: object) -> None:
        connection.cursor().execute(f"PRAGMA max_page_count = {limit[0]}")  # type: ignore[attr-defined]

    await want(deployment, "a", "b")
    limit[0] = 1

    async def fill() -> None:
        for _ in range(100):
            await deployment.begin_action("amal", "activate", "x" * 1000, "r1")

    with pytest.raises(StoreUnavailable, match="SQLITE_FULL"):
        await fill()
    assert (await deployment.wanted()).desired == "a"
    limit[0] = 2**30
    await want(deployment, "c", "a")
    assert (await deployment.wanted()).desired == "c"
    await deployment.database.dispose()
