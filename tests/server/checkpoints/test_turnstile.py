"""The turnstile: nobody is inside while it is closed and empty, and everyone gets in, in order, once."""

from __future__ import annotations

import asyncio

import pytest

from server.checkpoints.serving import Serving
from server.checkpoints.turnstile import Turnstile, Visit

pytestmark = pytest.mark.anyio
OLD, NEW = Serving("old", "/old", None), Serving("new", "/new", None)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """How many requests an engine has not finished."""

    unfinished = 0

    def __call__(self) -> int:
        return self.unfinished


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_closed_it_keeps_everyone_in_order_and_names_what_came_after() -> None:
    turnstile, seen = Turnstile(OLD, Engine()), []

    async def come(number: int) -> None:
        seen.append((number, (await turnstile.enter()).id))

    await come(0)
    turnstile.close()
    waiting = [asyncio.create_task(come(number)) for number in range(1, 9)]
    await settle()
    assert seen == [(0, "old")] and turnstile.waiting == 8
    turnstile.serving = NEW
    waits = turnstile.open()
    await asyncio.gather(*waiting)
    assert seen[1:] == [(number, "new") for number in range(1, 9)]
    assert waits.requests == 8 and waits.longest > 0 and turnstile.inside == 9


async def test_it_is_empty_when_the_engine_has_finished_not_when_the_client_has_read() -> None:
    engine = Engine()
    turnstile = Turnstile(OLD, engine)
    visit = Visit(turnstile)
    await visit.enter()
    turnstile.close()
    assert not await turnstile.empty(0.02)
    engine.unfinished = 1
    visit.leave()
    visit.leave()
    assert not await turnstile.empty(0.02)
    engine.unfinished = 0
    assert await turnstile.empty(0)


@pytest.mark.parametrize("opened_first", [False, True])
async def test_who_leaves_while_waiting_leaves_no_hole(opened_first: bool) -> None:
    turnstile = Turnstile(OLD, Engine())
    turnstile.close()
    first, gone, last = (asyncio.create_task(turnstile.enter()) for _ in range(3))
    await settle()
    if opened_first:
        turnstile.open()
        gone.cancel()
    else:
        gone.cancel()
        await settle()
        assert turnstile.waiting == 2
        turnstile.open()
    await asyncio.gather(first, last)
    assert gone.cancelled() or opened_first
    await asyncio.gather(gone, return_exceptions=True)
    assert gone.cancelled()
    assert turnstile.inside == 2


async def test_cancelled_and_opened_in_one_step() -> None:
    turnstile = Turnstile(OLD, Engine())
    turnstile.close()
    gone = asyncio.create_task(turnstile.enter())
    await settle()
    gone.cancel()
    turnstile.open()
    await asyncio.gather(gone, return_exceptions=True)
    assert turnstile.inside == 0 and turnstile.waiting == 0


async def test_closed_again_at_once_it_waits_for_those_it_let_in() -> None:
    turnstile = Turnstile(OLD, Engine())
    turnstile.close()
    waiting = asyncio.create_task(turnstile.enter())
    await settle()
    turnstile.open()
    turnstile.close()
    assert turnstile.inside == 1
    assert (await waiting).id == "old"
    turnstile.leave()
    assert await turnstile.empty(0)


async def test_shut_it_refuses_those_who_wait_and_those_who_come() -> None:
    turnstile = Turnstile(OLD, Engine())
    turnstile.close()
    waiting = asyncio.create_task(turnstile.enter())
    await settle()
    turnstile.shut(RuntimeError("broken"))
    for attempt in (waiting, turnstile.enter()):
        with pytest.raises(RuntimeError, match="broken"):
            await attempt
