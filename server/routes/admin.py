"""/admin: which checkpoints there are, who serves what, and changing it. With a key of its own, and an audit log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from server.auth import require_admin
from server.checkpoints.activate import Catalogue
from server.checkpoints.errors import CheckpointError, InvalidCheckpoint, UnknownCheckpoint
from server.checkpoints.registry import Checkpoint
from server.checkpoints.replica import Follower
from server.checkpoints.rollout import Action, Emit, Rollout, as_json
from server.conversations.errors import StoreError
from server.errors import ApiError, unavailable
from server.limits import CheckedRoute
from server.service import Service, service

log = logging.getLogger(__name__)

router = APIRouter(prefix="/admin", route_class=CheckedRoute, tags=["administration"])
Who = Annotated[str, Depends(require_admin)]
KEEP_ALIVE_SECONDS = 15.0
Job = Callable[[Action, Emit], Awaitable[dict[str, Any]]]


class Activation(BaseModel):
    """How to activate."""

    model_config = ConfigDict(extra="forbid")

    share: float | None = Field(
        None, gt=0, lt=1, description="Only for this share of the conversations; then promote or abort."
    )


class Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


def running(request: Request) -> Follower:
    """FastAPI dependency: this replica. Raises ApiError 503 while it loads, 404 where there is no registry."""
    current = service(request)
    current.loaded()
    if current.follower is None:
        raise ApiError(404, "This service was started without --checkpoints.", code="registry_off")
    return current.follower


Running = Annotated[Follower, Depends(running)]
Current = Annotated[Service, Depends(service)]


@router.get("/checkpoints")
async def list_checkpoints(who: Who, follower: Running) -> dict[str, Any]:
    """The checkpoints of the registry."""
    found = await asyncio.to_thread(follower.activator.catalogue.list)
    return {"object": "list", "data": [_described(one, follower) for one in found]}


@router.get("/checkpoints/{id}")
async def show_checkpoint(id: str, who: Who, follower: Running) -> dict[str, Any]:
    """One checkpoint, with its manifest."""
    found = await _find(follower.activator.catalogue, id)
    return {**_described(found, follower), "manifest": found.manifest.model_dump(mode="json")}


@router.post("/checkpoints/{id}/activate")
async def activate(id: str, body: Activation, who: Who, follower: Running, current: Current) -> StreamingResponse:
    """Serve a checkpoint from now on. Answers with server-sent events, the last of which is the report."""
    await _find(follower.activator.catalogue, id)
    rollout = Rollout(follower, current.deployment)
    what = "activate" if body.share is None else "canary"
    return await _stream(
        current, rollout, who, what, id, lambda action, emit: rollout.activate(action, id, body.share, emit)
    )


@router.post("/promote")
async def promote(body: Nothing, who: Who, follower: Running, current: Current) -> StreamingResponse:
    """Serve the canary's checkpoint to everyone."""
    rollout = Rollout(follower, current.deployment)
    return await _stream(current, rollout, who, "promote", None, rollout.promote)


@router.post("/abort")
async def abort(body: Nothing, who: Who, follower: Running, current: Current) -> StreamingResponse:
    """Take the canary back."""
    rollout = Rollout(follower, current.deployment)
    return await _stream(current, rollout, who, "abort", None, rollout.abort)


@router.get("/status")
async def status(who: Who, follower: Running, current: Current) -> dict[str, Any]:
    """What is wanted, what each replica serves, and what is going on here."""
    turnstile = follower.activator.engine.turnstile
    here = {
        "replica": follower.id,
        "serving": follower.serving,
        "phase": follower.activator.phase,
        "waiting_requests": turnstile.waiting,
    }
    wanted = await current.deployment.wanted()
    replicas = await current.deployment.replicas()
    busy = {"who": wanted.busy_who, "what": wanted.busy_what} if wanted.busy_who else None
    return {
        **here,
        "desired": wanted.desired,
        "previous": wanted.previous,
        "candidate": wanted.candidate,
        "share": wanted.share,
        "revision": wanted.revision,
        "busy": busy,
        "replicas": [as_json(one) for one in replicas],
    }


@router.get("/audit")
async def audit(
    who: Who,
    current: Current,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
) -> dict[str, Any]:
    """Who did what and what came of it, the newest first; `before` is the number of the last one of a page."""
    return {"object": "list", "data": await current.deployment.audit(limit, before)}


async def _find(catalogue: Catalogue, id: str) -> Checkpoint:
    try:
        return await asyncio.to_thread(catalogue.get, id)
    except UnknownCheckpoint:
        raise ApiError(404, "The registry has no such checkpoint.", param="id", code="checkpoint_not_found") from None
    except InvalidCheckpoint as error:
        raise ApiError(422, str(error), param="id", code="checkpoint_invalid") from None
    except CheckpointError as error:
        raise unavailable(str(error), retry_after=30, code="registry_unavailable") from None


def _described(checkpoint: Checkpoint, follower: Follower) -> dict[str, Any]:
    wanted = follower.wanted
    return {
        "id": checkpoint.id,
        "object": "checkpoint",
        "created": checkpoint.manifest.created,
        "description": checkpoint.manifest.description,
        "serving": checkpoint.id == follower.serving,
        "desired": wanted is not None and checkpoint.id == wanted.desired,
        "previous": wanted is not None and checkpoint.id == wanted.previous,
    }


async def _stream(
    current: Service, rollout: Rollout, who: str, what: str, checkpoint: str | None, job: Job
) -> StreamingResponse:
    """Do the job, to its end even when nobody listens any more. Raises ApiError 409 when it can't begin."""
    queue: asyncio.Queue[tuple[str, dict[str, Any]] | Exception | None] = asyncio.Queue()

    async def work() -> None:
        try:
            async with rollout.holding(who, what, checkpoint) as action:
                report = await job(action, lambda name, data: queue.put_nowait((name, data)))
            queue.put_nowait(("report", report))
        except (CheckpointError, StoreError) as error:
            queue.put_nowait(error)
        except Exception as error:
            log.exception("an activation failed")
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(work())
    current.actions.add(task)
    task.add_done_callback(current.actions.discard)
    first = await queue.get()
    if isinstance(first, CheckpointError):
        raise ApiError(409, str(first), code="deployment_busy")
    if isinstance(first, Exception):
        raise first
    if first is None:
        raise unavailable("The service is shutting down.", retry_after=5, code="shutting_down")
    return StreamingResponse(_events(first, queue), media_type="text/event-stream")


async def _events(
    first: tuple[str, dict[str, Any]], queue: asyncio.Queue[tuple[str, dict[str, Any]] | Exception | None]
) -> AsyncGenerator[str, None]:
    item: tuple[str, dict[str, Any]] | Exception | None = first
    while item is not None:
        if isinstance(item, Exception):
            item = ("report", {"result": "failed", "message": str(item)})
        yield f"event: {item[0]}\ndata: {json.dumps(item[1], ensure_ascii=False)}\n\n"
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
                break
            except TimeoutError:
                yield ": working\n\n"
