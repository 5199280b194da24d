"""Chat completions that take their turn in a stored conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.conversations import flow
from server.conversations.errors import StoreError
from server.conversations.flow import Ask, Chunk, LiveTurn, Reply, TurnStream
from server.conversations.items import read_items
from server.conversations.problems import problem
from server.conversations.prompt import Asked
from server.conversations.store import Store
from server.conversations.values import Idempotency, Turn
from server.engine import ChatCompletionResponse, Generated, StreamOptions
from server.errors import ApiError, envelope
from server.requests import ChatRequest
from server.service import Admission
from server.settings import Settings


async def answer_turn(
    request: ChatRequest, admission: Admission, store: Store, owner: str, once: Idempotency | None, settings: Settings
) -> Response:
    """Answer the messages as the next turn of `request.conversation`. Raises ApiError, StoreError."""
    ask = as_ask(request, owner, once, settings)
    wants_usage = bool(request.stream_options and request.stream_options.include_usage)
    live = await flow.begin(store, ask)
    if isinstance(live, Turn):
        return replayed(live, bool(request.stream), wants_usage)
    try:
        if request.stream:
            request.stream_options = StreamOptions(include_usage=True)
        generated = await flow.generate(live, ask, admission, request)
        if request.stream:
            return TurnStream(live, stream(live, generated, wants_usage))
        assert isinstance(generated, ChatCompletionResponse)
        turn = await live.finish(Reply.whole(generated))
    except BaseException:
        await live.close()
        raise
    # As a repeated request will get it.
    body = generated.model_dump() | {"created": int(turn.created_at), "usage": _usage(turn)}
    return JSONResponse(body, headers=live.headers())


def as_ask(request: ChatRequest, owner: str, once: Idempotency | None, settings: Settings) -> Ask:
    policy = request.language_policy or settings.language_policy
    guided = policy != "off"
    messages = read_items(request.messages, "messages")
    if messages[-1].speaker != "human":
        raise ApiError(400, "The last message must be the user's: there is nothing to answer.", param="messages")
    return Ask(
        owner=owner,
        asked=Asked(messages, None, request.language, guided),
        conversation_id=request.conversation,
        details={"model": request.model or settings.served_model_name, "guided": guided},
        idempotency=once,
        guarded=policy == "guard",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        param="messages",
    )


async def stream(live: LiveTurn, generated: Generated, wants_usage: bool) -> AsyncGenerator[str, None]:
    """vLLM's events as they are; the one that says why the reply ended waits for the commit."""
    assert isinstance(generated, AsyncGenerator)
    reply = Reply()
    held: list[Chunk] = []
    live.streaming = True
    try:
        async for data in generated:
            chunk = reply.read(data)
            if reply.finish_reason:
                held.append(chunk)
            else:
                yield chunk.event
                live.turn.sent(chunk.text)
        await live.finish(reply)
    except (ApiError, StoreError) as error:
        await live.close()
        yield failure(problem(error) if isinstance(error, StoreError) else error)
    else:
        for chunk in held:
            if wants_usage or not chunk.usage_only:
                yield chunk.event
    finally:
        await generated.aclose()


def failure(error: ApiError) -> str:
    body = envelope(error.status_code, str(error.detail), error.param, error.code)
    return f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n"


def replayed(turn: Turn, streamed: bool, wants_usage: bool) -> Response:
    """The completion of a request that was answered before, without log probabilities."""
    headers = {**flow.turn_headers(turn), "Idempotent-Replayed": "true"}
    if streamed:
        return StreamingResponse(replayed_events(turn, wants_usage), media_type="text/event-stream", headers=headers)
    message = {"role": "assistant", "content": turn.reply.value if turn.reply else ""}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(turn)}
    return JSONResponse(
        {**_frame(turn, "chat.completion"), "choices": [choice], "usage": _usage(turn)}, headers=headers
    )


def replayed_events(turn: Turn, wants_usage: bool) -> Iterator[str]:
    delta = {"role": "assistant", "content": turn.reply.value if turn.reply else ""}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason(turn)}
    frame = _frame(turn, "chat.completion.chunk")
    yield f"data: {json.dumps({**frame, 'choices': [choice]}, ensure_ascii=False)}\n\n"
    if wants_usage:
        yield f"data: {json.dumps({**frame, 'choices': [], 'usage': _usage(turn)})}\n\n"
    yield "data: [DONE]\n\n"


def finish_reason(turn: Turn) -> str:
    """A reply that broke off has none of its own in OpenAI's list; `length` is what says that it is not whole."""
    return "stop" if turn.status == "complete" else "length"


def _frame(turn: Turn, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{turn.response_id}",
        "object": kind,
        "created": int(turn.created_at),
        "model": turn.details.get("model"),
    }


def _usage(turn: Turn) -> dict[str, Any]:
    counted = turn.usage or flow.NOTHING_USED
    return {
        "prompt_tokens": counted.input_tokens,
        "completion_tokens": counted.output_tokens,
        "total_tokens": counted.input_tokens + counted.output_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
    }
