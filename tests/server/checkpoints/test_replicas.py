"""Several replicas on one PostgreSQL: they agree, whoever is asked, whatever fails, and whenever they start."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.checkpoints.deployment import in_share
from tests.server.checkpoints import twin
from tests.server.checkpoints.conftest import BASE, PATIENCE, TWIN, Administered, comes_from, headers, start, text
from tests.server.checkpoints.test_activation import until
from tests.server.conversations.postgres import Postgres, running_postgres

pytestmark = [pytest.mark.postgresql, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def replicas(
    database: Postgres, tmp_path_factory: pytest.TempPathFactory, registry: Path, canaries: Path
) -> Iterator[list[Administered]]:
    """Two that run; the second's registry is another, which knows the twin only. Tests may start more."""
    url = database.empty_database()
    few = tmp_path_factory.mktemp("few")
    shutil.copytree(registry / TWIN, few / TWIN)
    running = [start(tmp_path_factory.mktemp("first"), registry, canaries, BIMEDIX_STORE=url)]
    running.append(start(tmp_path_factory.mktemp("second"), few, canaries, BIMEDIX_STORE=url))
    try:
        for one in running:
            one.running.wait_until_ready()
        until(lambda: len(running[0].get("status")["replicas"]) == 2)
        yield running
    finally:
        for one in running:
            one.running.stop()


class Asking(threading.Thread):
    """Asks replicas in turn until it is stopped, and checks every reply."""

    def __init__(self, replicas: list[Administered]) -> None:
        super().__init__(daemon=True)
        self.replicas, self.stopping = list(replicas), False
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.stopping:
            for replica in self.replicas:
                try:
                    checkpoint, completion = replica.ask("What is asthma?")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                self.seen[checkpoint] += 1
                if not comes_from(text(completion), checkpoint):
                    self.failures.append(f"{checkpoint}: {text(completion)}")


def all_serve(replicas: list[Administered], checkpoint: str) -> bool:
    return {replica.ask("Hello", max_tokens=2)[0] for replica in replicas} == {checkpoint}


def test_two_converge_and_a_third_started_midway_comes_up_right(
    replicas: list[Administered], tmp_path_factory: pytest.TempPathFactory, registry: Path, canaries: Path
) -> None:
    first, second = replicas
    asking = Asking([first, second])
    asking.start()
    third = start(tmp_path_factory.mktemp("third"), registry, canaries, BIMEDIX_STORE=first.running.store)
    replicas.append(third)
    report = second.activate(TWIN)
    assert report["result"] == "activated", report
    assert {one["checkpoint"] for one in report["replicas"]} == {TWIN}
    assert all_serve([first, second], TWIN)
    asking.stopping = True
    asking.join(PATIENCE)
    assert not asking.failures and asking.seen[BASE] and asking.seen[TWIN]
    third.running.wait_until_ready()
    until(lambda: all_serve([third], TWIN))
    until(lambda: len([one for one in first.get("status")["replicas"] if one["state"] == "serving"]) == 3)


def test_what_fails_on_the_first_reaches_no_other(replicas: list[Administered]) -> None:
    before = replicas[0].get("status")["revision"]
    report = replicas[0].activate("noise")
    assert (report["result"], report["serving"]) == ("rolled_back", TWIN)
    status = replicas[1].get("status")
    assert (status["revision"], status["desired"]) == (before, TWIN)
    assert all_serve(replicas, TWIN)


def test_what_fails_on_another_is_taken_back_everywhere(replicas: list[Administered], registry: Path) -> None:
    """The second has no such checkpoint in its registry."""
    twin.make(registry, "unknown-elsewhere")
    report = replicas[0].activate("unknown-elsewhere")
    assert report["result"] == "rolled_back", report
    assert "there is no checkpoint unknown-elsewhere" in report["message"]
    assert {one["checkpoint"] for one in report["replicas"]} == {TWIN}
    assert all_serve(replicas, TWIN)


def test_a_canary_is_promoted_or_taken_back(replicas: list[Administered]) -> None:
    first = replicas[0]
    report = first.activate(BASE, share=0.4)
    assert report["result"] == "activated", report
    assert [one["checkpoint"] for one in report["replicas"] if one["canary"]] == [BASE]
    pools = [ready(replica, "canary") for replica in replicas]
    assert pools == [200, 503, 503]
    assert [ready(replica, "stable") for replica in replicas] == [503, 200, 200]
    # A replica hears of the share with its next heartbeat.
    until(lambda: pool_of_a_conversation(replicas[1])[1] is not None)
    for _ in range(6):
        conversation, pool = pool_of_a_conversation(replicas[1])
        assert pool == ("canary" if in_share(conversation, 0.4) else "stable")
    refused = httpx.post(f"{first.url}/admin/checkpoints/{TWIN}/activate", headers=headers(), json={}, timeout=PATIENCE)
    assert refused.status_code == 409
    assert "promote or abort" in refused.json()["error"]["message"]
    *_, (_, report) = replicas[1].follow("abort")
    assert report["result"] == "activated" and all_serve(replicas, TWIN)
    assert first.activate(BASE, share=0.4)["result"] == "activated"
    *_, (_, report) = replicas[2].follow("promote")
    assert report["result"] == "activated", report
    assert all_serve(replicas, BASE)
    until(lambda: [ready(replica, "stable") for replica in replicas] == [200, 200, 200])


def pool_of_a_conversation(replica: Administered) -> tuple[str, str | None]:
    """A new conversation, and the replicas that its reply says it belongs to."""
    client = replica.running.client()
    conversation = client.conversations.create()
    answer = client.responses.with_raw_response.create(input="Hello", conversation=conversation.id, max_output_tokens=2)
    return conversation.id, answer.headers.get("x-bimedix-pool")


def ready(replica: Administered, pool: str) -> int:
    return httpx.get(f"{replica.url}/ready", params={"pool": pool}, timeout=PATIENCE).status_code


def test_the_database_goes_and_comes_back(replicas: list[Administered], database: Postgres) -> None:
    """What is served is served on, and activating waits for its return."""
    database.kill()
    try:
        refused = httpx.post(
            f"{replicas[0].url}/admin/checkpoints/{TWIN}/activate", headers=headers(), json={}, timeout=PATIENCE
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert all_serve(replicas, BASE)
    finally:
        database.start()
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            assert replicas[0].activate(TWIN)["result"] == "activated"
            break
        except httpx.HTTPStatusError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert all_serve(replicas, TWIN)
