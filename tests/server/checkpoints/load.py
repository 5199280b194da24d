"""Streams without a pause and requests at a rate, each of which checks that its reply comes from one checkpoint."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from typing import Any

import httpx

from tests.server.checkpoints.conftest import PATIENCE, comes_from

STREAMS = 32
RATE = 20.0
"""Requests a second, besides the streams."""
PROMPTS = [
    "What is asthma?", "What is epilepsy?", "What is gout?", "What are the symptoms of influenza?",
    "What is vertigo?", "What is eczema?", "ما هو الصرع؟", "ما أعراض الربو؟", "ما هو النقرس؟", "ما هو الصداع النصفي؟",
]  # fmt: skip


class Load:
    """Runs until `stop`; `failures` says what went wrong, `replies` counts by checkpoint."""

    def __init__(self, url: str, prompts: list[str]) -> None:
        self.url, self.prompts = url, itertools.cycle(prompts)
        self.replies: Counter[str] = Counter()
        self.failures: list[str] = []
        self.longest = 0.0
        self._stopping = asyncio.Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        self._client = httpx.AsyncClient(timeout=PATIENCE, limits=limits)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Load:
        for _ in range(STREAMS):
            self._start(self._streaming())
        self._start(self._arriving())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        while self._tasks:
            await asyncio.gather(*self._tasks)
        await self._client.aclose()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _streaming(self) -> None:
        while not self._stopping.is_set():
            await self._checked(self._stream)

    async def _arriving(self) -> None:
        while not self._stopping.is_set():
            self._start(self._checked(self._whole))
            await asyncio.sleep(1 / RATE)

    async def _checked(self, ask: Any) -> None:
        prompt = next(self.prompts)
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
        began = asyncio.get_running_loop().time()
        try:
            checkpoint, reply, reason = await ask(body)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.failures.append(f"{prompt}: {error!r}")
            return
        self.longest = max(self.longest, asyncio.get_running_loop().time() - began)
        self.replies[checkpoint] += 1
        if reason != "stop" or not comes_from(reply, checkpoint):
            self.failures.append(f"{prompt}: {checkpoint} answered ({reason}) {reply}")

    async def _whole(self, body: dict[str, Any]) -> tuple[str, str, str]:
        response = await self._client.post(f"{self.url}/v1/chat/completions", json=body)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        return response.headers["x-bimedix-checkpoint"], choice["message"]["content"], choice["finish_reason"]

    async def _stream(self, body: dict[str, Any]) -> tuple[str, str, str]:
        pieces, reason, done = [], "", False
        request = {**body, "stream": True}
        async with self._client.stream("POST", f"{self.url}/v1/chat/completions", json=request) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                done = done or data == "[DONE]"
                if line and data != "[DONE]":
                    (choice,) = json.loads(data)["choices"]
                    pieces.append(choice["delta"].get("content") or "")
                    reason = choice["finish_reason"] or reason
            if not done:
                raise ValueError("the stream was cut")
            return response.headers["x-bimedix-checkpoint"], "".join(pieces), reason
