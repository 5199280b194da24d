"""One turn from claim to commit: begin it in the store, make its prompt, follow its reply, end it exactly once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.checkpoints.serving import Serving
from server.conversations.errors import StoreError
from server.conversations.prompt import Asked, compose, fit
from server.conversations.store import Store
from server.conversations.values import Idempotency, Item, RunningTurn, Turn, Usage, new_id
from server.engine import ChatCompletionResponse, Engine, Generated
from server.errors import ApiError
from server.language import Language
from server.language.hygiene import clean
from server.language.score import observed_language
from server.metrics import DROPPED_TURNS, REPLY_LANGUAGES, STORE_SECONDS, TURNS, count_cleaned
from server.requests import ChatRequest
from server.service import Admission
from server.vicuna import Message

log = logging.getLogger(__name__)

ENDINGS: dict[str | None, Literal["complete", "incomplete"]] = {"stop": "complete", "length": "incomplete"}
NOTHING_USED = Usage(0, 0)
SHARE_FOR_REPLY = 4
"""Without a limit of its own, a reply finds at least one part in so many of the window free."""


@dataclass(frozen=True)
class Ask:
    """A turn as an app asks for it."""

    owner: str
    asked: Asked
    conversation_id: str | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    idempotency: Idempotency | None = None
    stored: bool = True
    drop_oldest: bool = True
    max_tokens: int | None = None
    guarded: bool = False
    """Whether decoding keeps the reply's language."""
    param: str = "input"
    """What the request calls its messages."""


class LiveTurn:
    """A turn that runs in this process. Whoever holds it calls `finish`, and `close` whatever happens."""

    def __init__(self, store: Store, turn: RunningTurn, stored: bool) -> None:
        self.store, self.turn, self.stored = store, turn, stored
        self.streaming = False
        """Whether anything was sent: from then on a turn that breaks is incomplete, before it is failed."""
        self.pool: str | None = None
        """Which replicas the conversation belongs to, while there is a canary."""
        self._over = False

    async def finish(self, reply: Reply) -> Turn:
        """Commit the reply; when this returns, it lasts. Raises StoreError, and ApiError when it has no proper end."""
        status = ENDINGS.get(reply.finish_reason)
        if status is None:
            raise ApiError(500, "The engine stopped in the middle of the reply.", code="engine_error")
        if self.stored:
            began = time.perf_counter()
            turn = await self.store.finish_turn(self.turn, reply.text, status=status, usage=reply.usage)
            STORE_SECONDS.labels("finish").observe(time.perf_counter() - began)
        else:
            turn = self.turn.ended(status, reply.text, reply.usage, time.time())
        self._over = True
        TURNS.labels(status).inc()
        return turn

    async def close(self) -> None:
        """End a turn that was not finished: incomplete with what was sent of it, or failed when nothing was."""
        if self._over:
            return
        self._over = True
        TURNS.labels("interrupted" if self.streaming else "failed").inc()
        if self.stored and (self.streaming or not await self._failed()):
            await self.store.interrupt_turn(self.turn)

    async def _failed(self) -> bool:
        """Whether the turn could be written as failed. If not, the store ends it as interrupted when it can."""
        try:
            await self.store.fail_turn(self.turn)
        except StoreError:
            return False
        return True

    def headers(self) -> dict[str, str]:
        dropped = self.turn.details.get("dropped_turns")
        return turn_headers(self.turn) | {
            **({"X-Bimedix-Waited-Seconds": f"{self.turn.waited:.3f}"} if self.turn.waited else {}),
            **({"X-Bimedix-Pool": self.pool} if self.pool else {}),
            **({"X-Bimedix-Dropped-Turns": str(dropped)} if dropped else {}),
        }


def turn_headers(turn: RunningTurn | Turn) -> dict[str, str]:
    """What every generation says of itself."""
    return {"X-Bimedix-Checkpoint": turn.checkpoint or "", "X-Bimedix-Language": turn.language or ""}


async def begin(store: Store, ask: Ask) -> LiveTurn | Turn:
    """Claim the conversation; or the turn that the same request led to before. Raises StoreError."""
    if not ask.stored:
        return LiveTurn(store, await _unstored(store, ask), stored=False)
    began = time.perf_counter()
    begun = await store.begin_turn(
        ask.owner,
        ask.asked.messages,
        conversation_id=ask.conversation_id,
        previous_response_id=ask.previous_response_id,
        metadata=ask.metadata,
        details=ask.details,
        idempotency=ask.idempotency,
    )
    if isinstance(begun, Turn):
        TURNS.labels("replayed").inc()
        return begun
    STORE_SECONDS.labels("begin").observe(time.perf_counter() - began - begun.waited)
    return LiveTurn(store, begun, stored=True)


async def _unstored(store: Store, ask: Ask) -> RunningTurn:
    """A turn that the store never sees. What it follows is read, where it follows something."""
    history: tuple[Turn, ...] = ()
    if ask.previous_response_id is not None:
        history = await store.get_chain(ask.owner, ask.previous_response_id)
    return RunningTurn(
        number=0,
        response_id=new_id("resp"),
        message_id=new_id("msg"),
        conversation_id=None,
        created_at=time.time(),
        waited=0.0,
        inputs=tuple(Item(new_id("msg"), m.speaker, m.value, "completed") for m in ask.asked.messages),
        history=history,
        metadata=ask.metadata,
        details=dict(ask.details),
    )


async def prepare(live: LiveTurn, ask: Ask, engine: Engine, serving: Serving) -> list[Message]:
    """The turn's prompt as chat messages; notes its language and what was dropped. Raises ApiError 400."""
    turn = live.turn
    count_cleaned(clean(message.value) for message in ask.asked.messages)
    try:
        prompt = compose(turn.history, ask.asked, serving.directives)
    except ValueError as error:
        raise ApiError(400, str(error), param=ask.param, code="invalid_value") from None
    turn.language = prompt.language
    if not ask.drop_oldest:
        return prompt.messages()
    window = engine.max_model_len
    room = window - (ask.max_tokens or window // SHARE_FOR_REPLY)
    # By its time: items that were deleted since do not move it.
    kept_from = max((earlier.details.get("kept_from", 0.0) for earlier in turn.history), default=0.0)
    dropped_before = sum(began < kept_from for began in prompt.begun)
    fitted = await fit(prompt, room, engine.count_chat, dropped_before)
    if fitted.dropped:
        turn.details["dropped_turns"] = fitted.dropped
        turn.details["kept_from"] = (*prompt.begun, turn.created_at)[fitted.dropped]
        DROPPED_TURNS.inc(fitted.dropped - dropped_before)
    return fitted.messages


async def generate(live: LiveTurn, ask: Ask, admission: Admission, request: ChatRequest) -> Generated:
    """Start the turn's reply. Raises ApiError."""
    turn, engine, visit = live.turn, admission.engine, admission.visit
    live.pool = admission.pool(turn.conversation_id)
    serving = await visit.enter()
    turn.checkpoint = engine.claim(serving, request, visit)
    request.messages = await prepare(live, ask, engine, serving)
    request.request_id = turn.response_id
    guarded = cast(Language, turn.language) if ask.guarded else None
    try:
        return await engine.create_chat(request, None, visit, lambda reply: _count_language(turn, reply), guarded)
    except ApiError as error:
        error.param = ask.param if error.param == "messages" else error.param
        raise


def _count_language(turn: RunningTurn, reply: str) -> None:
    REPLY_LANGUAGES.labels(turn.language, observed_language(reply)).inc()


@dataclass
class Reply:
    """What has come of a reply so far."""

    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None

    @classmethod
    def whole(cls, generated: Generated) -> Reply:
        """A reply that was not streamed."""
        assert isinstance(generated, ChatCompletionResponse)
        (choice,) = generated.choices
        return cls([choice.message.content or ""], choice.finish_reason, read_usage(generated.usage.model_dump()))

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def read(self, event: str) -> Chunk:
        """Take in one event of a chat completion's stream. Raises ApiError when it says that the engine failed."""
        data = event.removeprefix("data: ").strip()
        if data == "[DONE]":
            return Chunk(event, "", False)
        body = json.loads(data)
        if "error" in body:
            raise ApiError(500, "The engine failed in the middle of the reply.", code="engine_error")
        if body.get("usage"):
            self.usage = read_usage(body["usage"])
        if not body["choices"]:
            return Chunk(event, "", True)
        choice = body["choices"][0]
        text = choice["delta"].get("content") or ""
        self.pieces.append(text)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return Chunk(event, text, False)


@dataclass(frozen=True)
class Chunk:
    """An event of a chat completion's stream, the text in it, and whether it holds the usage and nothing else."""

    event: str
    text: str
    usage_only: bool


def read_usage(usage: dict[str, Any]) -> Usage:
    """A chat completion's usage."""
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0)


class TurnStream(StreamingResponse):
    """A stream that leaves its turn ended, also when the client is gone before the first event."""

    def __init__(self, live: LiveTurn, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=live.headers())
        self.live, self.events = live, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()
            await self.live.close()
