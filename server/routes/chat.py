"""POST /v1/chat/completions, POST /v1/completions and GET /v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.auth import require_key
from server.conversations.idempotency import idempotency
from server.engine import ChatCompletionResponse, CompletionResponse, Generated, with_cancellation
from server.errors import ApiError
from server.language import Language
from server.language.guide import NO_DIRECTIVES, guide
from server.language.hygiene import clean
from server.language.score import observed_language
from server.limits import CheckedRoute
from server.metrics import REPLY_LANGUAGES, count_cleaned
from server.requests import ChatRequest, TextRequest
from server.routes.chat_turns import answer_turn
from server.routes.conversations import Owner
from server.service import Admission, admitted, service
from server.vicuna import normalise

router = APIRouter(route_class=CheckedRoute, dependencies=[Depends(require_key)], tags=["generation"])
Admitted = Annotated[Admission, Depends(admitted)]


@router.post("/v1/chat/completions", response_model=ChatCompletionResponse)
@with_cancellation
async def create_chat_completion(
    request: ChatRequest, raw_request: Request, admission: Admitted, owner: Owner
) -> Response:
    """Answer a conversation, as JSON or as server-sent events."""
    current = service(raw_request)
    # Not a dependency, which would cost each request more than this.
    once = await idempotency(raw_request)
    if request.conversation is not None:
        return await answer_turn(request, admission, current.store, owner, once, current.settings)
    policy = request.language_policy or current.settings.language_policy
    cleaned = [clean(message["content"]) for message in request.messages]
    count_cleaned(cleaned)
    try:
        messages = normalise(
            [{**message, "content": text} for message, (text, _) in zip(request.messages, cleaned, strict=True)]
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    serving = await admission.visit.enter()
    checkpoint = admission.engine.claim(serving, request, admission.visit)
    directives = serving.directives if policy != "off" else NO_DIRECTIVES
    request.messages, language = guide(messages, request.language, directives)
    guarded = language if policy == "guard" else None
    generated = await admission.engine.create_chat(
        request, raw_request, admission.visit, lambda reply: count_reply(language, reply), guarded
    )
    return respond(generated, {"X-Bimedix-Checkpoint": checkpoint, "X-Bimedix-Language": language})


def count_reply(expected: Language, reply: str) -> None:
    REPLY_LANGUAGES.labels(expected, observed_language(reply)).inc()


@router.post("/v1/completions", response_model=CompletionResponse)
@with_cancellation
async def create_completion(request: TextRequest, raw_request: Request, admission: Admitted) -> Response:
    """Continue raw text; with `echo` and `logprobs`, score it."""
    serving = await admission.visit.enter()
    checkpoint = admission.engine.claim(serving, request, admission.visit)
    generated = await admission.engine.create_completion(request, raw_request, admission.visit)
    return respond(generated, {"X-Bimedix-Checkpoint": checkpoint})


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The checkpoint that is served, and the adapters over it."""
    return {"object": "list", "data": service(request).loaded().model_cards()}


def respond(generated: Generated, headers: dict[str, str]) -> Response:
    """vLLM's result as a response: a body, or a stream of events."""
    if isinstance(generated, ChatCompletionResponse | CompletionResponse):
        return JSONResponse(generated.model_dump(), headers=headers)
    return StreamingResponse(generated, media_type="text/event-stream", headers=headers)
