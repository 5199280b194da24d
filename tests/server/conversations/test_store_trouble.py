"""A database that is down, full, locked or read-only: one exception, nothing people wrote in it, and recovery."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, text

from server.conversations import database
from server.conversations.database import async_url
from server.conversations.errors import StoreError, StoreUnavailable
from server.conversations.store import Store
from server.conversations.values import Message
from tests.server.conversations.conftest import OWNER
from tests.server.conversations.postgres import Postgres, running_postgres
from tests.server.conversations.test_store import exchange, values
from tests.server.conversations.test_turns import begin

pytestmark = pytest.mark.anyio
SECRET = "the patient's secret"


def path_of(store: Store) -> str:
    assert store.database.url.database is not None
    return store.database.url.database


@pytest.mark.parametrize(
    "bad", ["", "nothing", "mysql://h/d", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true"]
)
def test_only_stores_that_last_are_accepted(bad: str) -> None:
    with pytest.raises(ValueError, match="the store is a URL"):
        async_url(bad)


def test_urls_are_given_to_the_async_drivers() -> None:
    assert async_url("sqlite:///a/memory.db").drivername == "sqlite+aiosqlite"
    given = async_url("postgres://u:p@h:5/d?sslmode=require")
    assert (given.drivername, given.query, given.password) == ("postgresql+asyncpg", {"ssl": "require"}, "p")
    assert database.shown_url("postgresql://u:p@h/d") == "postgresql://u:***@h/d"


async def test_connections_keep_what_they_commit(store: Store) -> None:
    async with store.database.read() as session:
        connection = await session.connection()
        if not store.database.is_sqlite:
            assert (await connection.exec_driver_sql("SHOW synchronous_commit")).scalar() == "on"
            return
        for pragma, wanted in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("secure_delete", 1)):
            assert (await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar() == wanted
    assert os.stat(path_of(store)).st_mode & 0o077 == 0


async def test_nobody_listening_is_unavailable_and_open_may_come_later(tmp_path: Path) -> None:
    store = Store(f"postgresql://u@/d?host={tmp_path}")
    with pytest.raises(StoreUnavailable):
        await store.open()
    with pytest.raises(StoreUnavailable):
        await store.create_conversation(OWNER)
    await store.close()


async def test_a_new_file_is_opened_after_whoever_else_is_at_it(tmp_path: Path) -> None:
    """The other has the write lock of a file without a log yet; SQLite says busy at once to those who want one."""
    path = tmp_path / "conversations.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    asyncio.get_running_loop().call_later(0.2, other.rollback)
    async with Store(f"sqlite:///{path}") as store:
        assert (await store.count())["conversations"] == 0
    other.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)


@pytest.mark.usefixtures("impatient")
async def test_a_locked_file_is_unavailable_until_it_is_free(tmp_path: Path) -> None:
    async with Store(f"sqlite:///{tmp_path / 'c.db'}") as store:
        made = await store.create_conversation(OWNER)
        other = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="SQLITE_BUSY"):
            await begin(store, SECRET, conversation_id=made.id)
        assert (await store.get_conversation(OWNER, made.id)).id == made.id
        other.execute("ROLLBACK")
        other.close()
        await exchange(store, made.id, "a", "b")


async def test_a_full_disk_is_unavailable_until_there_is_room(tmp_path: Path) -> None:
    limit = [2**30]
    store = Store(f"sqlite:///{tmp_path / 'c.db'}")

    @event.listens_for(store.database.engine.sync_engine, "checkout")
    def restrict(connection: object, *_: object) -> None:
        connection.cursor().execute(f"PRAGMA max_page_count = {limit[0]}")  # type: ignore[attr-defined]

    async with store:
        made = await store.create_conversation(OWNER)
        limit[0] = 60
        kept = 0
        refused = None
        while refused is None and kept < 200:
            try:
                turn = await begin(store, f"{kept}", conversation_id=made.id)
                await store.finish_turn(turn, SECRET * 100)
                kept += 1
            except StoreUnavailable as error:
                await store.interrupt_turn(turn)
                refused = error.reason
        assert refused == "SQLITE_FULL"
        complete = [item.value for item in (await store.list_items(OWNER, made.id, order="asc", limit=100)).items]
        assert 0 < kept < 50
        assert complete[: 2 * kept : 2] == [str(n) for n in range(kept)]
        limit[0] = 2**30
        await exchange(store, made.id, "room", "again")
        assert (await values(store, made.id))[-2:] == ["room", "again"]


async def test_text_of_a_reply_that_found_the_disk_full_is_written_later(tmp_path: Path) -> None:
    limit = [2**30]
    store = Store(f"sqlite:///{tmp_path / 'c.db'}", checkpoint_seconds=0.1)

    @event.listens_for(store.database.engine.sync_engine, "checkout")
    def restrict(connection: object, *_: object) -> None:
        connection.cursor().execute(f"PRAGMA max_page_count = {limit[0]}")  # type: ignore[attr-defined]

    async with store:
        turn = await begin(store, "a")
        limit[0] = 1
        text = SECRET * 1000
        with pytest.raises(StoreUnavailable):
            await store.finish_turn(turn, text)
        turn.sent(text)
        await store.interrupt_turn(turn)
        limit[0] = 2**30
        await asyncio.sleep(0.5)
        ended = await store.get_turn(OWNER, turn.response_id)
        assert (ended.status, ended.reply and ended.reply.value) == ("incomplete", text)


async def test_another_process_may_come_and_go(tmp_path: Path) -> None:
    """The last one to leave a SQLite file deletes its log: it must see that we still have it open."""
    url = f"sqlite:///{tmp_path / 'c.db'}"
    async with Store(url) as store:
        await store.create_conversation(OWNER)
        command = [sys.executable, "-m", "server.cli", "conversations", "count", "--store", url]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        assert await process.wait() == 0
        assert Path(f"{path_of(store)}-wal").exists()  # noqa: ASYNC240


@pytest.mark.postgresql
async def test_a_read_only_server_is_unavailable(postgres: Postgres) -> None:
    url = postgres.empty_database()
    async with Store(url) as store:
        made = await store.create_conversation(OWNER)
    postgres.run("ALTER DATABASE tests SET default_transaction_read_only = on")
    try:
        async with Store(url) as store:
            assert (await store.get_conversation(OWNER, made.id)).id == made.id
            with pytest.raises(StoreUnavailable, match="25006"):
                await store.create_conversation(OWNER)
    finally:
        postgres.run("ALTER DATABASE tests RESET default_transaction_read_only")


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.mark.postgresql
async def test_the_database_stops_and_starts_under_load(own_postgres: Postgres) -> None:
    """What was acknowledged is there, once; the same store goes on; stopped means StoreUnavailable, nothing else."""
    async with Store(own_postgres.empty_database(), checkpoint_seconds=0.1) as store:
        made = [await store.create_conversation(OWNER) for _ in range(8)]
        acknowledged: list[set[str]] = [set() for _ in made]
        refused = 0
        stopping = False

        async def talk(n: int) -> None:
            nonlocal refused
            turns = 0
            while not stopping:
                turns += 1
                try:
                    turn = await begin(store, f"{n}.{turns}", conversation_id=made[n].id)
                    turn.sent(f"{n}.{turns}!")
                    try:
                        await store.finish_turn(turn, f"{n}.{turns}!")
                        acknowledged[n].add(f"{n}.{turns}")
                    except StoreUnavailable:
                        await store.interrupt_turn(turn)
                        raise
                except StoreUnavailable:
                    refused += 1
                    await asyncio.sleep(0.05)

        talkers = [asyncio.create_task(talk(n)) for n in range(8)]
        for _ in range(3):
            await asyncio.sleep(0.5)
            await asyncio.to_thread(own_postgres.kill)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_postgres.start)
            before = sum(map(len, acknowledged))
            while sum(map(len, acknowledged)) < before + 16:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        stopping = True
        await asyncio.gather(*talkers)
        await asyncio.sleep(0.3)
        assert refused > 0
        assert store._keeper.owed == set()
        for conversation, wanted in zip(made, acknowledged, strict=True):
            turn = await begin(store, "check", conversation_id=conversation.id)
            complete = [old.inputs[0].value for old in turn.history if old.status == "complete"]
            assert wanted <= set(complete)
            assert len(complete) == len(set(complete))
            for old in turn.history:
                assert old.reply is not None
                assert old.reply.value in (
                    {f"{old.inputs[0].value}!"} | ({""} if old.status == "incomplete" else set())
                )


async def test_what_people_write_is_in_no_log_and_no_exception(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = await store.create_conversation(OWNER, metadata={"m": SECRET}, items=[Message("human", SECRET)])
    await exchange(store, made.id, SECRET, SECRET)
    for statement in (
        "INSERT INTO items (turn_number, id, speaker, value, is_reply) VALUES (-1, 'x', 'human', :secret, true)",
        "INSERT INTO items (turn_number, id, speaker, value, is_reply) VALUES (1, 'x', :secret, 'x', true)",
        "SELECT nothing FROM items WHERE value = :secret",
    ):
        with pytest.raises(StoreError) as caught:
            async with store.database.write() as session:
                await session.execute(text(statement), {"secret": SECRET})
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in shown
        assert caught.value.__suppress_context__
    assert SECRET not in caplog.text
