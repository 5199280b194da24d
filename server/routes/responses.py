"""/v1/responses: one turn, stored or not, as OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.auth import require_key
from server.conversations import flow
from server.conversations.errors import StoreError
from server.conversations.flow import Ask, LiveTurn, Reply, TurnStream
from server.conversations.items import page_json
from server.conversations.problems import problem
from server.conversations.prompt import Asked
from server.conversations.requests import ResponseRequest
from server.conversations.responses import ECHOED, Events, as_json, ended_response, running_response
from server.conversations.values import Idempotency, Turn
from server.engine import Generated, with_cancellation
from server.errors import ApiError
from server.limits import CheckedRoute
from server.routes.chat import Admitted
from server.routes.conversations import After, Limit, OnceOnly, Opened, Order, Owner
from server.service import service
from server.settings import Settings

router = APIRouter(route_class=CheckedRoute, dependencies=[Depends(require_key)], tags=["responses"])


@router.post("/v1/responses")
@with_cancellation
async def create_response(
    body: ResponseRequest, raw_request: Request, admission: Admitted, owner: Owner, store: Opened, once: OnceOnly
) -> Response:
    """Take a turn, as JSON or as server-sent events; it is committed before the last one is sent."""
    ask = as_ask(body, owner, once, service(raw_request).settings)
    live = await flow.begin(store, ask)
    if isinstance(live, Turn):
        return replayed(live, body.stream)
    try:
        generated = await flow.generate(live, ask, admission, body.chat)
        if body.stream:
            return TurnStream(live, stream(live, generated))
        turn = await live.finish(Reply.whole(generated))
    except BaseException:
        await live.close()
        raise
    return JSONResponse(as_json(ended_response(turn, live.stored)), headers=live.headers())


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, owner: Owner, store: Opened, stream: bool = False) -> dict[str, Any]:
    """A response that has ended."""
    if stream:
        raise ApiError(400, "Only background responses can be streamed again; this service has none.", param="stream")
    return as_json(ended_response(await store.get_turn(owner, response_id)))


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """Delete a response with its input, for good; its conversation goes on without it."""
    await store.delete_turn(owner, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """Always refused: only background responses can be cancelled, and there are none. Close the stream instead."""
    await store.get_turn(owner, response_id)
    raise ApiError(
        400,
        "Only background responses can be cancelled, and this service has none: to stop a reply, close its stream.",
        param="response_id",
        code="not_cancellable",
    )


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str, owner: Owner, store: Opened, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> dict[str, Any]:
    """A page of what a response was asked with, without earlier turns."""
    return page_json(await store.list_input_items(owner, response_id, after=after, limit=limit, order=order))


def as_ask(body: ResponseRequest, owner: str, once: Idempotency | None, settings: Settings) -> Ask:
    if once is not None and not body.store:
        raise ApiError(400, "An Idempotency-Key needs store=true: without it no result is kept.", param="store")
    echoed = body.model_dump(mode="json", include=set(ECHOED), exclude_none=True, by_alias=True)
    policy = body.language_policy or settings.language_policy
    guided = policy != "off"
    return Ask(
        owner=owner,
        asked=Asked(body.messages, body.instructions, body.language, guided),
        conversation_id=body.conversation_id,
        previous_response_id=body.previous_response_id,
        metadata=body.metadata,
        details={"model": settings.served_model_name, **echoed, "guided": guided},
        idempotency=once,
        guarded=policy == "guard",
        stored=body.store,
        drop_oldest=body.truncation == "auto",
        max_tokens=body.max_output_tokens,
    )


async def stream(live: LiveTurn, generated: Generated) -> AsyncGenerator[str, None]:
    """The response's events. What a client did not get to see is not counted as sent."""
    assert isinstance(generated, AsyncGenerator)
    events, reply = Events(live.turn.message_id), Reply()
    live.streaming = True
    try:
        for event in events.begin(running_response(live.turn, live.stored)):
            yield event
        async for data in generated:
            if text := reply.read(data).text:
                yield events.delta(text)
                live.turn.sent(text)
        response = ended_response(await live.finish(reply), live.stored)
    except (ApiError, StoreError) as error:
        await live.close()
        yield events.error(problem(error) if isinstance(error, StoreError) else error)
    else:
        for event in events.end(response):
            yield event
    finally:
        await generated.aclose()


def replayed(turn: Turn, streamed: bool) -> Response:
    """The response to a request that was answered before."""
    headers = {**flow.turn_headers(turn), "Idempotent-Replayed": "true"}
    if streamed:
        return StreamingResponse(replayed_events(turn), media_type="text/event-stream", headers=headers)
    return JSONResponse(as_json(ended_response(turn)), headers=headers)


def replayed_events(turn: Turn) -> Iterator[str]:
    """The events of a turn that has ended, its text in one delta."""
    if turn.reply is None:
        raise ApiError(404, "The reply to this request was deleted.", code="not_found")
    events = Events(turn.reply.id)
    yield from events.begin(running_response(turn))
    yield events.delta(turn.reply.value)
    yield from events.end(ended_response(turn))
