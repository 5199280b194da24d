"""A service that is killed in any phase of an activation starts again on what the database wants, and serves it."""

from __future__ import annotations

import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.server.checkpoints.conftest import BASE, TWIN, Administered, comes_from, start, text
from tests.server.checkpoints.test_activation import until

ROUNDS = [("verify", "prepare"), ("drain", "reload"), ("gate", "commit")]
"""Two services at a time: starting is most of the work, and most of that is waiting."""


def wanted(store: Path) -> str:
    """What the database wants; nothing means what the service was configured with."""
    with closing(sqlite3.connect(store)) as connection:
        return str(connection.execute("SELECT coalesce(desired, ?) FROM deployment", [BASE]).fetchone()[0])


def kill_in(service: Administered, phase: str, store: Path) -> None:
    """Begin to activate the other checkpoint, and kill all processes in `phase`."""
    # What was held by the process that was killed before is held for some seconds more.
    until(lambda: service.get("status")["busy"] is None)
    other = TWIN if wanted(store) == BASE else BASE
    with closing(sqlite3.connect(store, isolation_level=None)) as lock:
        try:
            for name, event in service.follow(f"checkpoints/{other}/activate"):
                assert name == "phase", event
                if event["phase"] == "verify" and phase != "commit":
                    # However late the kill comes, the change was not committed before it.
                    lock.execute("BEGIN IMMEDIATE")
                if event["phase"] == phase:
                    break
        except httpx.TransportError:
            pytest.fail("the service went away by itself")
        finally:
            os.killpg(service.running.process.pid, signal.SIGKILL)
            service.running.process.wait()


def round_of(directory: Path, registry: Path, canaries: Path, phase: str | None) -> None:
    """Start, check that what is wanted is served, and be killed; without a phase, stop."""
    store = directory / "conversations.db"
    expected = wanted(store) if store.exists() else BASE
    service = start(directory, registry, canaries)
    try:
        service.running.wait_until_ready()
        checkpoint, completion = service.ask("What is asthma?")
        assert checkpoint == expected
        assert comes_from(text(completion), expected)
        if phase is not None:
            kill_in(service, phase, store)
            assert phase == "commit" or wanted(store) == expected
    finally:
        service.running.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_any_phase_it_starts_on_the_last_good_checkpoint(
    tmp_path: Path, registry: Path, canaries: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    for phases in (*ROUNDS, (None, None)):
        with ThreadPoolExecutor(2) as pool:
            rounds = [
                pool.submit(round_of, folder, registry, canaries, phase)
                for folder, phase in zip(folders, phases, strict=True)
            ]
        for one in rounds:
            one.result()
