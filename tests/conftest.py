"""The real service for tests: `bimedix serve` as a subprocess on the embedded checkpoint, started once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import settings

from server.checkpoints.serving import read_serving
from server.settings import EMBEDDED_CHECKPOINT

# How long an example takes says more about the machine than about the code.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

EMBEDDED_ID = read_serving(str(EMBEDDED_CHECKPOINT)).id
START_SECONDS = 480
CLIENTS: list[openai.OpenAI] = []


@dataclass
class RunningService:
    """A service process and how to reach it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    store: str

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """A client that is closed when the test ends."""
        CLIENTS.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60))
        return CLIENTS[-1]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=15).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise RuntimeError(f"the service was not ready after {START_SECONDS} s:\n{self.log.read_text()}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_service(directory: Path, *flags: str, **environment: str) -> RunningService:
    """Start `bimedix serve` on a free port; does not wait."""
    port, log = free_port(), directory / "service.log"
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BIMEDIX_")}
    # Never the user's own conversations.
    environment.setdefault("BIMEDIX_STORE", f"sqlite:///{directory / 'conversations.db'}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**clean, **environment}, start_new_session=True
        )
    return RunningService(process, f"http://127.0.0.1:{port}", log, environment["BIMEDIX_STORE"])


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A ready service without keys, shared by all tests."""
    running = start_service(tmp_path_factory.mktemp("service"))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(autouse=True)
def no_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that name no store find none: whoever runs the tests may have one, of another version."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
    monkeypatch.delenv("BIMEDIX_STORE", raising=False)


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


@pytest.fixture
def client(service: RunningService) -> openai.OpenAI:
    return service.client()
