"""`python -m server.checkpoints.benchmark`: what a new checkpoint costs those who ask meanwhile.

Three ways, in one run, under the same requests: activating in place, restarting the server, and starting a second
server and switching to it. Each way starts from a running server and ends with another checkpoint answering. A request
that is refused or cut off is sent again until it is answered, and its wait counts from its first attempt, as a person
waits. Weights are the embedded checkpoint's and a copy of it under another id: of that size, starting is most of what
the usual ways cost, and loading weights the least.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from server.checkpoints.manifest import FILE
from server.checkpoints.remote import events
from server.checkpoints.serving import read_serving
from server.settings import EMBEDDED_CHECKPOINT

COPY = "bimedix-embedded-copy"
ORIGINAL = read_serving(str(EMBEDDED_CHECKPOINT)).id
BODY = {"messages": [{"role": "user", "content": "What is asthma?"}], "temperature": 0, "max_tokens": 32}
PATIENCE = 600.0
RETRY_SECONDS = 0.05


@dataclass
class Server:
    """`bimedix serve` on a port of its own."""

    process: asyncio.subprocess.Process
    url: str

    async def ready(self) -> None:
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    if (await client.get(f"{self.url}/ready", timeout=PATIENCE)).status_code == 200:
                        return
                except httpx.TransportError:
                    if self.process.returncode is not None:
                        raise RuntimeError("the server ended while it started") from None
                await asyncio.sleep(RETRY_SECONDS)

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()


async def serve(folder: Path, model: Path, key: str) -> Server:
    """Start a server on `model`; does not wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "BIMEDIX_ADMIN_KEYS": f"benchmark:{key}"}
    store = f"sqlite:///{folder / f'{port}.db'}"
    flags = ["--port", str(port), "--checkpoints", str(folder / "registry"), "--model", str(model), "--store", store]
    # As for the embedded checkpoint, whose copy this may be.
    flags += ["--kv-cache-memory-bytes", str(2**29), "--gpu-memory-utilization", "0.1"]
    null = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "server.cli", "serve", *flags, stdout=null, stderr=null, env=environment
    )
    return Server(process, f"http://127.0.0.1:{port}")


@dataclass
class Asking:
    """Requests at a rate, to whatever `url` is at the time; `waits` are in seconds."""

    url: str
    rate: float
    waits: list[float] = field(default_factory=list)
    refused: int = 0

    @asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        stop, tasks = asyncio.Event(), set()
        async with httpx.AsyncClient(timeout=PATIENCE) as client:

            async def arrive() -> None:
                while not stop.is_set():
                    tasks.add(asyncio.create_task(self._ask(client)))
                    await asyncio.sleep(1 / self.rate)

            arriving = asyncio.create_task(arrive())
            try:
                yield
            finally:
                stop.set()
                await arriving
                await asyncio.gather(*tasks)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        began, failed = time.monotonic(), False
        while True:
            try:
                if (await client.post(f"{self.url}/v1/chat/completions", json=BODY)).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            failed = True
            await asyncio.sleep(RETRY_SECONDS)
        self.waits.append(time.monotonic() - began)
        self.refused += failed


@dataclass
class Bench:
    """Where the servers' files are, and what is measured by way."""

    folder: Path
    rate: float
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    phases: list[dict[str, float]] = field(default_factory=list)

    async def measure(self, way: str, asking: Asking, change: Callable[[], Awaitable[None]]) -> None:
        """One change of the checkpoint under requests, with a second of them before and after."""
        async with asking.going():
            await asyncio.sleep(1)
            began = time.monotonic()
            await change()
            taken = time.monotonic() - began
            await asyncio.sleep(1)
        row = {"seconds": taken, "longest_wait": max(asking.waits), "median_wait": statistics.median(asking.waits)}
        self.rows.setdefault(way, []).append({**row, "refused": asking.refused, "requests": len(asking.waits)})

    async def in_place(self, server: Server, rounds: int) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE, headers={"Authorization": f"Bearer {self.key}"}) as admin:

            async def activate(id: str) -> None:
                answer = await admin.post(f"{server.url}/admin/checkpoints/{id}/activate", json={})
                *_, (_, report) = events(iter(answer.text.splitlines()))
                if report["result"] != "activated":
                    raise RuntimeError(f"the activation ended as {report}")
                self.phases.append(report["seconds"])

            for number in range(rounds):
                change = partial(activate, ORIGINAL if number % 2 else COPY)
                await self.measure("activate in place", Asking(server.url, self.rate), change)

    async def restart(self, server: Server, rounds: int) -> Server:
        for _ in range(rounds):
            asking = Asking(server.url, self.rate)

            async def change(asking: Asking = asking) -> None:
                nonlocal server
                await server.stop()
                server = await serve(self.folder, EMBEDDED_CHECKPOINT, self.key)
                asking.url = server.url
                await server.ready()

            await self.measure("restart the server", asking, change)
        return server

    async def second(self, server: Server, rounds: int) -> Server:
        for _ in range(rounds):
            asking = Asking(server.url, self.rate)

            async def change(asking: Asking = asking) -> None:
                nonlocal server
                old, server = server, await serve(self.folder, EMBEDDED_CHECKPOINT, self.key)
                await server.ready()
                asking.url = server.url
                await old.stop()

            await self.measure("second server, then switch", asking, change)
        return server


async def run(rounds: int, rate: float) -> dict[str, Any]:
    """All three ways; medians over the rounds, in seconds."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), rate)
        copy = bench.folder / "registry" / COPY
        shutil.copytree(EMBEDDED_CHECKPOINT, copy)
        manifest = json.loads((copy / FILE).read_text(encoding="utf-8"))
        (copy / FILE).write_text(json.dumps({**manifest, "id": COPY}), encoding="utf-8")
        server = await serve(bench.folder, EMBEDDED_CHECKPOINT, bench.key)
        try:
            await server.ready()
            await bench.in_place(server, 2 * rounds)
            server = await bench.restart(server, rounds)
            server = await bench.second(server, rounds)
        finally:
            await server.stop()
    return {"rounds": rounds, "rate": rate, "phases": medians(bench.phases), "ways": _by_way(bench.rows)}


def _by_way(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {way: medians(measured) for way, measured in rows.items()}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[-1]}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Changes by each of the usual ways; twice as many in place.")] = 3,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second meanwhile.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Activation phases, and the longest wait of a request by three ways to a new checkpoint."""
    found = asyncio.run(run(rounds, rate))
    typer.echo(f"Phases of an activation, seconds (median of {2 * rounds})")
    for phase, taken in found["phases"].items():
        typer.echo(f"  {phase:<10}{taken:9.3f}")
    typer.echo(f"\n{'way (medians)':<28}{'longest wait':>13}{'median wait':>13}{'refused':>9}{'whole change':>14}")
    for way, row in found["ways"].items():
        waits = f"{row['longest_wait']:>11.2f} s{row['median_wait']:>11.2f} s"
        typer.echo(f"{way:<28}{waits}{row['refused']:>9.0f}{row['seconds']:>12.2f} s")
    if as_json:
        typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
