"""An OpenAI-compatible endpoint that does exactly what it is told: known delays, known faults, known counters.

The `model` of a request names the script. Times are lower bounds that only the operating system can stretch.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

FIRST_S = 0.12
GAP_S = 0.01
SLOTS = 4
SLOT_S = 0.1
STALL_S = 1.0
QUEUE_S = 0.007
FAULTS = ("steady", "http-429", "error-event", "dropped", "short", "abort", "empty")

Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Seen:
    """One chat request as it arrived."""

    at: float
    body: dict[str, Any]
    headers: dict[str, str]


def chunk(delta: dict[str, Any], finish: str | None = None, usage: dict[str, Any] | None = None) -> bytes:
    event = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(event | ({"usage": usage} if usage else {})).encode() + b"\n\n"


def usage_of(completion: int) -> dict[str, Any]:
    return {"prompt_tokens": 40, "completion_tokens": completion, "prompt_tokens_details": {"cached_tokens": 30}}


def usage_event(completion: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": usage_of(completion)}).encode() + b"\n\n"


@dataclass
class Scripted:
    """The endpoint's state, and its address once it runs."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    finished: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SLOTS))

    def reset(self) -> None:
        """Forget what earlier tests asked, after a stalled reply of theirs has ended."""
        while self.running:
            time.sleep(0.01)
        self.seen.clear()
        self.most_running = 0

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/v1/models":
            await answer(send, 200, json.dumps({"data": [{"id": "steady"}]}).encode())
        elif path == "/metrics":
            await answer(send, 200, self.metrics().encode())
        elif path == "/version":
            await answer(send, 200, b'{"version":"scripted"}')
        else:
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.seen.append(Seen(time.perf_counter(), json.loads(body), headers))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await self.chat(self.seen[-1].body, send)
            finally:
                self.running -= 1
                self.finished += 1

    def metrics(self) -> str:
        """Each finished request waited QUEUE_S, and 30 of its 40 prompt tokens were cached."""
        return (
            f'# HELP vllm:prefix_cache_hits_total x\nvllm:prefix_cache_hits_total{{engine="0"}} {30 * self.finished}\n'
            f'vllm:prefix_cache_queries_total{{engine="0"}} {40 * self.finished}.0\n'
            f'vllm:request_queue_time_seconds_sum{{engine="0"}} {QUEUE_S * self.finished}\n'
            f'vllm:request_queue_time_seconds_count{{engine="0"}} {self.finished}\n'
        )

    async def chat(self, body: dict[str, Any], send: Send) -> None:
        script, tokens = body["model"], body["max_tokens"]
        if script == "faults":  # the warm-up, then one of each, in turn
            script = FAULTS[(len(self.seen) - 2) % len(FAULTS)] if len(self.seen) > 1 else "steady"
        if script == "http-429":
            return await answer(send, 429, b'{"error":{"message":"slow down"}}', [(b"retry-after", b"1")])
        if script == "plain-openai" and "continuous_usage_stats" in body["stream_options"]:
            return await answer(send, 400, b'{"error":{"message":"unknown field"}}')
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-bimedix-checkpoint", b"c0ffee")]})

        async def say(payload: bytes, delay: float = 0.0) -> None:
            await asyncio.sleep(delay)
            await send({"type": "http.response.body", "body": payload, "more_body": True})

        await say(b": keep-alive\n\n")
        await say(chunk({"role": "assistant", "content": ""}))
        if script == "stall":
            await asyncio.sleep(STALL_S)
        if script == "slots":
            async with self.slots:
                for step in range(1, 6):
                    share = tokens * step // 5
                    await say(chunk({"content": "w "}, None, usage_of(share)), SLOT_S / 5)
        elif script == "one-event":
            await say(chunk({"content": "w " * tokens}, None, usage_of(tokens)), GAP_S)
        elif script == "empty":
            await say(chunk({}, None), GAP_S)
        else:
            await self.words(script, tokens, say)
        if script == "dropped":
            return None  # ends the connection in the middle of the body
        if script == "error-event":
            await say(b'data: {"error": {"message": "engine died", "code": 500}}\n\n')
        else:
            finish = {"abort": "abort", "short": "stop", "empty": "length"}.get(script, "length")
            counted = 0 if script == "empty" else tokens // 2 if script == "short" else tokens
            await say(chunk({}, finish, usage_of(counted) if script == "duplicate-usage" else None))
            await say(usage_event(counted))
        if script != "unfinished":
            await say(b"data: [DONE]\n\n")
        return await send({"type": "http.response.body", "body": b""})

    async def words(self, script: str, tokens: int, say: Callable[..., Awaitable[None]]) -> None:
        """Text events: the first FIRST_S after the role chunk, then one every GAP_S; `bursts` puts four in each."""
        count = tokens // 2 if script in ("short", "abort", "error-event", "dropped") else tokens
        burst = 4 if script == "bursts" else 1
        counted = script in ("bursts", "steady")
        for done in range(burst, count + 1, burst):
            usage = usage_of(done) if counted else None
            await say(chunk({"content": "word " * burst}, None, usage), FIRST_S if done == burst else GAP_S)


async def answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers or []})
    await send({"type": "http.response.body", "body": body})


class Running:
    """The endpoint on a free port in a thread of its own."""

    def __init__(self) -> None:
        self.app = Scripted()
        config = uvicorn.Config(self.app, port=0, lifespan="off", ws="none", log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Scripted:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.app.url = f"http://127.0.0.1:{port}"
        return self.app

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
