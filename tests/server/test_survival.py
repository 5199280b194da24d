"""What lasts when the service is killed in the middle of its streams, and when its database goes away."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.conversations.store import Store
from tests.conftest import RunningService, start_service
from tests.server.conversations.postgres import Postgres, running_postgres
from tests.server.test_conversations import texts

KILLS = 3
TALKERS = 4
ENDED = {"response.completed", "response.incomplete"}


class Talker(threading.Thread):
    """Takes turns in one conversation, and remembers which were acknowledged and what it saw of the others."""

    def __init__(self, url: str, conversation: str, begin: int) -> None:
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.conversation, self.number = conversation, begin
        self.acknowledged: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        self.refused = 0
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            self.number += 1
            try:
                self.turn(f"question {self.number}")
            except (openai.ConflictError, openai.InternalServerError):
                self.refused += 1
                time.sleep(0.05)
            except (openai.APIError, httpx.TransportError):
                time.sleep(0.05)

    def turn(self, question: str) -> None:
        self.seen[question] = ""
        stream = self.client.responses.create(
            input=question, conversation=self.conversation, stream=True, max_output_tokens=40,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        for event in stream:
            if event.type == "response.output_text.delta":
                self.seen[question] += event.delta
            if event.type in ENDED:
                self.acknowledged[question] = self.seen[question]


def check(found: list[str], talker: Talker) -> None:
    """Every acknowledged turn is there, whole and once; of any other, no more than what its client was sent."""
    questions, replies = found[::2], found[1::2]
    assert len(questions) == len(set(questions)) == len(replies)
    kept = dict(zip(questions, replies, strict=True))
    for question, reply in talker.acknowledged.items():
        assert kept[question] == reply
    for question in (set(talker.seen) & set(kept)) - set(talker.acknowledged):
        # A kill loses at most what was not saved yet. A commit whose last event never arrived may be whole.
        assert kept[question].startswith(talker.seen[question]) or talker.seen[question].startswith(kept[question])


async def stored_texts(url: str, conversation: str) -> list[str]:
    async with Store(url) as store:
        page = await store.list_items("anonymous", conversation, order="asc", limit=1000)
        return [item.value for item in page.items]


def talkers(service: RunningService, conversations: list[str], begin: int) -> list[Talker]:
    started = [Talker(service.url, name, begin) for name in conversations]
    for talker in started:
        talker.start()
    return started


def test_nothing_acknowledged_is_lost_when_the_service_is_killed(tmp_path: Path) -> None:
    conversations: list[str] = []
    everyone: list[Talker] = []
    for kill in range(KILLS):
        service = start_service(tmp_path)
        try:
            service.wait_until_ready()
            client = service.client()
            conversations = conversations or [client.conversations.create().id for _ in range(TALKERS)]
            for talker in everyone:
                check(texts(client, talker.conversation), talker)
            talking = talkers(service, conversations, begin=1000 * kill)
            until_each_has(talking, 1)
            time.sleep(random.uniform(0, 0.5))
        finally:
            os.killpg(service.process.pid, signal.SIGKILL)
            service.process.wait()
        for talker in talking:
            talker.stopping = True
            talker.join(30)
        everyone += talking
    for talker in everyone:
        check(asyncio.run(stored_texts(service.store, talker.conversation)), talker)


def until_each_has(talking: list[Talker], turns: int) -> None:
    """Wait until each has so many more turns acknowledged."""
    wanted = [len(talker.acknowledged) + turns for talker in talking]
    until(lambda: all(len(talker.acknowledged) >= n for talker, n in zip(talking, wanted, strict=True)))


def until(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def on_postgres(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that is started while its database is down."""
    url = database.empty_database()
    database.kill()
    running = start_service(tmp_path_factory.mktemp("postgres"), BIMEDIX_STORE=url)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


def hello(service: RunningService) -> openai.types.chat.ChatCompletion:
    return service.client().chat.completions.create(
        model="bimedix", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )


@pytest.mark.postgresql
def test_without_a_database_chat_goes_on_and_conversations_say_so(
    on_postgres: RunningService, database: Postgres
) -> None:
    client = on_postgres.client()
    assert hello(on_postgres).choices
    refused = httpx.post(f"{on_postgres.url}/v1/responses", json={"input": "x", "max_output_tokens": 2}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    with pytest.raises(openai.InternalServerError):
        client.conversations.create()
    assert client.responses.create(input="x", store=False, max_output_tokens=2).output
    database.start()
    until(lambda: works(client))


def works(client: openai.OpenAI) -> bool:
    try:
        return bool(client.conversations.create().id)
    except openai.InternalServerError:
        return False


@pytest.mark.postgresql
def test_turns_on_postgresql(on_postgres: RunningService) -> None:
    client = on_postgres.client()
    made = client.conversations.create()
    once: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "k"}, "conversation": made.id, "max_output_tokens": 4}
    first = client.responses.create(input="ما الربو؟", **once)
    assert client.responses.create(input="ما الربو؟", **once) == first
    *_, last = client.responses.create(input="And why?", conversation=made.id, max_output_tokens=4, stream=True)
    assert last.type in ENDED
    assert client.responses.retrieve(last.response.id) == last.response  # type: ignore[union-attr]
    assert len(texts(client, made.id)) == 4


@pytest.mark.postgresql
def test_the_database_stops_and_starts_under_load(on_postgres: RunningService, database: Postgres) -> None:
    client = on_postgres.client()
    talking = talkers(on_postgres, [client.conversations.create().id for _ in range(TALKERS)], begin=0)
    for _ in range(2):
        until_each_has(talking, 1)
        database.kill()
        until(lambda: all(talker.refused for talker in talking))
        assert hello(on_postgres).choices
        database.start()
        for talker in talking:
            talker.refused = 0
        until_each_has(talking, 1)
    for talker in talking:
        talker.stopping = True
        talker.join(60)
    # Turns that were owed to the database are written within a second.
    time.sleep(2)
    for talker in talking:
        check(texts(client, talker.conversation), talker)
