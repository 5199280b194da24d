"""Response objects and their stream of events, as OpenAI's own models, made from turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, cast

from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseErrorEvent,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import Conversation, IncompleteDetails
from openai.types.responses.response_error import ResponseError
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel

from server.conversations.values import Item, RunningTurn, Turn, Usage
from server.errors import ApiError

Status = Literal["completed", "failed", "in_progress", "incomplete"]
STATUSES: dict[str, Status] = {"complete": "completed", "incomplete": "incomplete", "failed": "failed"}

ECHOED = (
    "instructions", "model", "temperature", "top_p", "max_output_tokens", "previous_response_id", "truncation", "text",
)  # fmt: skip
"""What a request asked for and its response says again; kept in the turn's details."""


def running_response(turn: RunningTurn | Turn, stored: bool = True) -> Response:
    """The response at the beginning of its stream."""
    return _response(turn, "in_progress", [], stored)


def ended_response(turn: Turn, stored: bool = True) -> Response:
    """The response to an ended turn."""
    output = [message(turn.reply)] if turn.reply is not None and turn.status != "failed" else []
    response = _response(turn, STATUSES[turn.status], output, stored)
    response.usage = usage(turn.usage) if turn.usage else None
    if turn.status == "complete":
        response.completed_at = turn.ended_at
    elif turn.status == "failed":
        response.error = ResponseError(code="server_error", message="The reply failed before anything was sent.")
    elif turn.usage is not None:
        # Only a reply that ran to its end was counted; one that was cut off names no reason, as OpenAI has none for it.
        response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
    return response


def _response(turn: RunningTurn | Turn, status: Status, output: list[ResponseOutputMessage], stored: bool) -> Response:
    conversation = turn.conversation_id
    echoed: dict[str, Any] = {name: turn.details.get(name) for name in ECHOED}
    response = Response(
        id=cast(str, turn.response_id),
        object="response",
        created_at=int(turn.created_at),
        status=status,
        background=False,
        error=None,
        incomplete_details=None,
        output=cast(Any, output),
        conversation=Conversation(id=conversation) if conversation else None,
        metadata={**turn.metadata, **_notes(turn)},
        parallel_tool_calls=False,
        tool_choice="none",
        tools=[],
        usage=None,
        **echoed,
    )
    response.store = stored  # type: ignore[attr-defined]
    return response


def _notes(turn: RunningTurn | Turn) -> dict[str, str]:
    """What this service says in a response's metadata."""
    dropped = turn.details.get("dropped_turns")
    return {"bimedix_dropped_turns": str(dropped)} if dropped else {}


def message(reply: Item) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id=reply.id, type="message", role="assistant", status=reply.status, content=[_text(reply.value)]
    )


def _text(text: str) -> ResponseOutputText:
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])


def usage(counted: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=counted.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=counted.cached_tokens, cache_write_tokens=0),
        output_tokens=counted.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=counted.input_tokens + counted.output_tokens,
    )


def as_json(model: BaseModel) -> dict[str, Any]:
    """What is sent: fields that were set, null where they are null."""
    return model.model_dump(mode="json", exclude_unset=True, by_alias=True)


class Events:
    """The events of one response's stream, numbered, as server-sent events."""

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self._number = -1

    def begin(self, response: Response) -> Iterator[str]:
        yield self._event(ResponseCreatedEvent, "response.created", response=response)
        yield self._event(ResponseInProgressEvent, "response.in_progress", response=response)
        item = ResponseOutputMessage(
            id=self.message_id, type="message", role="assistant", status="in_progress", content=[]
        )
        yield self._event(ResponseOutputItemAddedEvent, "response.output_item.added", output_index=0, item=item)
        yield self._part(ResponseContentPartAddedEvent, "response.content_part.added", part=_text(""))

    def delta(self, text: str) -> str:
        return self._part(ResponseTextDeltaEvent, "response.output_text.delta", delta=text, logprobs=[])

    def end(self, response: Response) -> Iterator[str]:
        """The last events of a response that is completed or incomplete."""
        item = cast(ResponseOutputMessage, response.output[0])
        part = cast(ResponseOutputText, item.content[0])
        yield self._part(ResponseTextDoneEvent, "response.output_text.done", text=part.text, logprobs=[])
        yield self._part(ResponseContentPartDoneEvent, "response.content_part.done", part=part)
        yield self._event(ResponseOutputItemDoneEvent, "response.output_item.done", output_index=0, item=item)
        if response.status == "completed":
            yield self._event(ResponseCompletedEvent, "response.completed", response=response)
        else:
            yield self._event(ResponseIncompleteEvent, "response.incomplete", response=response)

    def error(self, error: ApiError) -> str:
        """The last event of a stream that broke on our side."""
        return self._event(ResponseErrorEvent, "error", code=error.code, message=str(error.detail), param=error.param)

    def _part(self, model: type[BaseModel], kind: str, **fields: Any) -> str:
        return self._event(model, kind, item_id=self.message_id, output_index=0, content_index=0, **fields)

    def _event(self, model: type[BaseModel], kind: str, **fields: Any) -> str:
        self._number += 1
        event = model(type=kind, sequence_number=self._number, **fields)
        body = json.dumps(as_json(event), ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {body}\n\n"
