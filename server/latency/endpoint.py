"""An OpenAI-compatible endpoint: sends one chat completion, times its stream, and records how it went."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from server.latency.reply import Outcome, Record, Reply
from server.settings import is_loopback

KEY_VARIABLE = "BIMEDIX_API_KEY"
CHECKPOINT_HEADER = "X-Bimedix-Checkpoint"
LINE_LIMIT = 2**20  # bytes; aiohttp refuses longer lines


class EndpointError(Exception):
    """The endpoint cannot be measured at all: nothing listens, no model, every request refused."""


@dataclass(frozen=True)
class Turn:
    """What to ask. Latency counts from `due` (perf_counter seconds), when the request should have been sent."""

    messages: list[dict[str, str]]
    language: str
    words: int
    due: float
    number: int = 1


@dataclass(frozen=True)
class Sample:
    """A record with what only the summary needs: the reply's events, and when they count from (perf_counter)."""

    record: Record
    reply: Reply
    due: float


@dataclass(frozen=True)
class _Ending:
    outcome: Outcome
    status: int | None
    error: str
    sent: float
    latency: float


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests and what every request asks for. `url` ends before /v1."""

    session: aiohttp.ClientSession
    url: str
    model: str
    max_tokens: int
    fixed_length: bool
    timeout_s: float
    name: str = ""
    token_counts: bool = True

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request. Greedy, so that two endpoints with one checkpoint do the same work.

        `ignore_eos` (fixed length) and `continuous_usage_stats` (token counts in every event) are vLLM extensions.
        """
        usage = {"include_usage": True, **({"continuous_usage_stats": True} if self.token_counts else {})}
        fixed = {"ignore_eos": True} if self.fixed_length else {}
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": usage,
            **fixed,
        }

    async def send(self, turn: Turn, stage: int, origin: float) -> Sample:
        """Ask and time one turn; never raises for what the endpoint does. `origin` is when the stage began."""
        reply, sent = Reply(), time.perf_counter()
        outcome, status, error = await self._attempt(turn, reply)
        ending = _Ending(outcome, status, error[:200], sent, time.perf_counter() - turn.due)
        return Sample(self._record(turn, reply, ending, stage, origin), reply, turn.due)

    async def _attempt(self, turn: Turn, reply: Reply) -> tuple[Outcome, int | None, str]:
        status = None
        try:
            async with asyncio.timeout(self.timeout_s), self._post(turn) as response:
                status, reply.checkpoint = response.status, response.headers.get(CHECKPOINT_HEADER)
                if status != 200:
                    return "http error", status, (await response.content.read(2000)).decode(errors="replace")
                async for line in response.content:
                    reply.feed(line, time.perf_counter() - turn.due)
        except TimeoutError:
            return "timeout", status, f"no complete reply within {self.timeout_s:g} s"
        except aiohttp.ClientConnectorError as failure:
            return "no connection", status, str(failure)
        except (aiohttp.ClientError, ValueError) as failure:
            # A reply that said [DONE] is whole, however the connection closes afterwards.
            if not reply.done:
                return "dropped", status, reply.error or str(failure) or type(failure).__name__
        return reply.outcome(self.max_tokens if self.fixed_length else None), status, reply.error

    def _post(self, turn: Turn) -> Any:
        url = f"{self.url}/v1/chat/completions"
        return self.session.post(url, json=self.body(turn.messages), allow_redirects=False)

    def _record(self, turn: Turn, reply: Reply, ending: _Ending, stage: int, origin: float) -> Record:
        details = reply.usage.get("prompt_tokens_details") or {}
        return Record(
            stage=stage,
            endpoint=self.name,
            language=turn.language,
            turn=turn.number,
            prompt_words=turn.words,
            started_s=turn.due - origin,
            late_s=ending.sent - turn.due,
            outcome=ending.outcome,
            status=ending.status,
            finish_reason=reply.finish_reason,
            error=ending.error,
            first_chunk_s=reply.first_chunk,
            ttft_s=reply.events[0].at if reply.events else None,
            tpot_s=reply.tpot(),
            latency_s=ending.latency,
            prompt_tokens=reply.usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            completion_tokens=reply.tokens,
            tokens_from="usage" if reply.usage.get("completion_tokens") else "events",
            characters=len(reply.text),
            words=len(reply.text.split()),
            checkpoint=reply.checkpoint,
        )


def check_url(url: str, allow_remote: bool) -> str:
    """The URL without a trailing /v1. Raises EndpointError when it is no http(s) URL or, unless allowed, not local."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise EndpointError(f"{url!r} is not a plain http(s) URL")
    if not allow_remote and not is_loopback(parts.hostname):
        raise EndpointError(f"{parts.hostname} is another machine: load-testing it needs --allow-remote")
    return url.rstrip("/").removesuffix("/v1")


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without connection limits or proxies, with the key of BIMEDIX_API_KEY when it is set.

    aiohttp, because it spends a third of httpx's processor time per streamed event (24 against 69 microseconds), and
    what the client spends is taken from a server on the same machine.
    """
    key = os.environ.get(KEY_VARIABLE)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        read_bufsize=LINE_LIMIT,
    ) as session:
        yield session


async def get_text(session: aiohttp.ClientSession, url: str) -> str | None:
    """The body of a GET, or None when it is not answered with 200 within five seconds."""
    try:
        async with asyncio.timeout(5), session.get(url, allow_redirects=False) as response:
            return await response.text() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None


async def find_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first model that the endpoint lists. Raises EndpointError."""
    try:
        async with asyncio.timeout(10), session.get(f"{url}/v1/models", allow_redirects=False) as response:
            if response.status != 200:
                raise EndpointError(f"{url}/v1/models answered {response.status}: is {KEY_VARIABLE} needed?")
            return str((await response.json(content_type=None))["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, LookupError, TypeError, ValueError) as failure:
        raise EndpointError(f"{url} lists no model: {failure or type(failure).__name__}") from None


async def warmed(endpoint: Endpoint) -> tuple[Endpoint, str | None]:
    """The endpoint after one short reply that is not measured, and the checkpoint that gave it.

    Token counts in every event are given up if the endpoint refuses to send them.

    Raises EndpointError when it answers neither way.
    """
    question = [{"role": "user", "content": "Hello"}]
    for candidate in (endpoint, replace(endpoint, token_counts=False)):
        turn = Turn(question, "en", 1, time.perf_counter())
        record = (await replace(candidate, max_tokens=8).send(turn, 0, turn.due)).record
        if record.outcome == "ok":
            return candidate, record.checkpoint
        if record.status not in (400, 422):
            break
    raise EndpointError(f"{endpoint.url} failed a first short reply: {record.outcome} {record.status} {record.error}")
