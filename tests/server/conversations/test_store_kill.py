"""kill -9 of a process with eight concurrent writers, at random moments, again and again.

BIMEDIX_TEST_KILLS sets how often (50 on SQLite; PostgreSQL, whose server is another process, gets a fifth).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time

import pytest

from server.conversations.store import Store
from server.conversations.values import RunningTurn, Turn
from tests.server.conversations import writers

pytestmark = pytest.mark.anyio
KILLS = int(os.environ.get("BIMEDIX_TEST_KILLS", "50"))
WRITERS = 8


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts processes in milliseconds: each is forked from one that has the store imported and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server.conversations.store", "alembic.command", "aiosqlite", "asyncpg"])
    return context


def kill_once(
    context: multiprocessing.context.ForkServerContext, url: str, conversations: list[str], kept: list[dict[int, str]]
) -> None:
    receive, send = context.Pipe(duplex=False)
    following = [max(turns, default=-1) + 1 for turns in kept]
    process = context.Process(target=writers.work, args=(url, conversations, following, send), daemon=True)
    process.start()
    send.close()
    deadline = time.monotonic() + random.choice([random.uniform(0, 0.3), random.uniform(0.3, 1.2)])
    while (left := deadline - time.monotonic()) > 0 and process.is_alive():
        if receive.poll(left):
            _note(receive, kept)
    assert process.is_alive(), "the writers died by themselves"
    process.kill()
    process.join()
    # What it said before it died counts: it had been told that the turn is kept.
    while True:
        try:
            _note(receive, kept)
        except EOFError:
            break
    receive.close()


def _note(receive: object, kept: list[dict[int, str]]) -> None:
    writer, number, status = receive.recv()  # type: ignore[attr-defined]
    assert number not in kept[writer]
    kept[writer][number] = status


def check(history: tuple[Turn, ...], writer: int, kept: dict[int, str]) -> int:
    """The turns of one writer: all that were acknowledged, in order, each once and whole. Returns how many."""
    numbers = []
    for turn in history:
        (question,) = turn.inputs
        assert turn.reply is not None
        name, _, number = question.value.partition(".")
        assert name == str(writer)
        numbers.append(int(number))
        answer = writers.answer_to(question.value)
        if turn.status == "complete":
            assert turn.reply.value == answer
        else:
            assert turn.status == "incomplete"
            assert (answer + " ").startswith(turn.reply.value)
    # Every acknowledged turn, then at most the one that was under way when the last kill came.
    assert numbers in (list(range(len(kept))), list(range(len(kept) + 1)))
    for turn, status in zip(history, kept.values(), strict=False):
        assert turn.status == status
    return len(numbers)


@pytest.mark.timeout(300)
async def test_kills_lose_no_acknowledged_turn(url: str, processes: multiprocessing.context.ForkServerContext) -> None:
    async with Store(url) as store:
        conversations = [(await store.create_conversation(writers.OWNER)).id for _ in range(WRITERS)]
    kept: list[dict[int, str]] = [{} for _ in range(WRITERS)]
    kills = KILLS if url.startswith("sqlite") else KILLS // 5
    for _ in range(kills):
        await asyncio.to_thread(kill_once, processes, url, conversations, kept)
    async with Store(url) as store:
        total = 0
        for writer, conversation in enumerate(conversations):
            probe = await store.begin_turn(writers.OWNER, [], conversation_id=conversation)
            assert isinstance(probe, RunningTurn)
            total += check(probe.history, writer, kept[writer])
            await store.fail_turn(probe)
        counts = await store.count()
        assert counts["complete"] + counts["incomplete"] == total
        if store.database.is_sqlite:
            async with store.database.read() as session:
                connection = await session.connection()
                assert (await connection.exec_driver_sql("PRAGMA integrity_check")).scalar() == "ok"
                assert (await connection.exec_driver_sql("PRAGMA foreign_key_check")).all() == []
    statuses = [status for turns in kept for status in turns.values()]
    print(f"{len(statuses)} turns acknowledged, {statuses.count('incomplete')} of them cut short by a kill")
    assert statuses.count("complete") > kills


async def test_a_store_killed_while_it_is_made_can_be_made(
    url: str, processes: multiprocessing.context.ForkServerContext
) -> None:
    for _ in range(5):
        process = processes.Process(target=writers.work, args=(url, [], [], None), daemon=True)
        process.start()
        await asyncio.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
    async with Store(url) as store:
        assert (await store.count())["conversations"] == 0
