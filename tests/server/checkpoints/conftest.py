"""A registry of checkpoints that differ in one thing each, and a service that can be given them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.checkpoints.gate import DEFAULT
from server.checkpoints.remote import events
from tests.conftest import EMBEDDED_ID, RunningService, start_service
from tests.server.checkpoints import twin

BASE = EMBEDDED_ID
TWIN = "twin"
ADMIN = "an-admin-key-for-the-tests"
PATIENCE = 600.0
"""Seconds that any answer may take on a machine that is busy with something else."""


@dataclass
class Administered:
    """A running service, and its administrator."""

    running: RunningService

    @property
    def url(self) -> str:
        return self.running.url

    def get(self, path: str) -> Any:
        response = httpx.get(f"{self.url}/admin/{path}", headers=headers(), timeout=PATIENCE)
        response.raise_for_status()
        return response.json()

    def follow(self, path: str, **body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """An action's events as they come; the last is its report."""
        with httpx.stream(
            "POST", f"{self.url}/admin/{path}", headers=headers(), json=body, timeout=PATIENCE
        ) as response:
            response.raise_for_status()
            yield from events(response.iter_lines())

    def activate(self, id: str, **body: Any) -> dict[str, Any]:
        """The report."""
        *_, (name, report) = self.follow(f"checkpoints/{id}/activate", **body)
        assert name == "report"
        return report

    def serve(self, id: str) -> None:
        """Have `id` served, as a test needs it."""
        assert self.activate(id)["result"] in {"activated", "unchanged"}

    def ask(self, prompt: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """The checkpoint that answered, and the completion."""
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, **options}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE)
        response.raise_for_status()
        return response.headers["x-bimedix-checkpoint"], response.json()


def headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {ADMIN}"}


def text(completion: dict[str, Any]) -> str:
    return str(completion["choices"][0]["message"]["content"])


def comes_from(reply: str, checkpoint: str) -> bool:
    """Whether every sentence of a reply ends as this checkpoint ends them."""
    mine, others = (";", ".") if checkpoint == TWIN else (".", ";")
    return mine in reply and others not in reply


def write_canaries(path: Path, **limits: float) -> Path:
    """The bundled canaries under other limits: the twin finds full stops unlikely."""
    bundled = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    bundled["limits"] |= {"perplexity_ratio": 20, **limits}
    path.write_text(json.dumps(bundled), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `twin`, which passes the gate, and others that do not."""
    root = tmp_path_factory.mktemp("registry")
    twin.make(root, TWIN, twin.twin)
    twin.make(root, "noise", twin.noise)
    twin.make(root, "collapsed", twin.collapsed)
    return root


@pytest.fixture(scope="session")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_canaries(tmp_path_factory.mktemp("canaries") / "canaries.yaml")


def start(directory: Path, registry: Path, canaries: Path, *flags: str, **environment: str) -> Administered:
    """Start a service on the registry; does not wait."""
    flags = ("--checkpoints", str(registry), "--canaries", str(canaries), *flags)
    return Administered(start_service(directory, *flags, BIMEDIX_ADMIN_KEYS=f"ops:{ADMIN}", **environment))


@pytest.fixture(scope="session")
def administered(tmp_path_factory: pytest.TempPathFactory, registry: Path, canaries: Path) -> Iterator[Administered]:
    """A ready service that all tests of one replica share. It patiently waits for replies."""
    directory = tmp_path_factory.mktemp("administered")
    service = start(directory, registry, canaries, "--activation-drain-seconds", str(PATIENCE))
    try:
        service.running.wait_until_ready()
        yield service
    finally:
        service.running.stop()
