"""/admin/adapters: the LoRA adapters that are applied beside the model, and changing them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from server.auth import require_admin
from server.checkpoints.adapter_set import AdapterRefused, AdapterSet, UnknownAdapter
from server.conversations.errors import StoreError
from server.errors import ApiError
from server.limits import CheckedRoute
from server.service import Service, service

log = logging.getLogger(__name__)

router = APIRouter(prefix="/admin/adapters", route_class=CheckedRoute, tags=["administration"])
Who = Annotated[str, Depends(require_admin)]
Current = Annotated[Service, Depends(service)]


class Source(BaseModel):
    """What to apply."""

    model_config = ConfigDict(extra="forbid")

    directory: str = Field(
        min_length=1, max_length=4096, description="Where every replica finds the adapter: an absolute path."
    )


def adapters(request: Request) -> AdapterSet:
    """FastAPI dependency: this replica's adapters. Raises ApiError 503 while it loads, 404 where vLLM applies none."""
    current = service(request)
    current.loaded()
    if current.adapters is None:
        raise ApiError(
            404, "This service applies no adapters: start it with --adapter or --enable-lora.", code="adapters_off"
        )
    return current.adapters


Adapters = Annotated[AdapterSet, Depends(adapters)]


@router.get("")
async def list_adapters(who: Who, adapters: Adapters) -> dict[str, Any]:
    """The adapters of this replica, how many requests use each, and what is wrong with any."""
    return {"object": "list", "data": adapters.described()}


@router.put("/{name}")
async def add_adapter(name: str, body: Source, who: Who, adapters: Adapters, current: Current) -> dict[str, Any]:
    """Apply an adapter under a name from now on. Requests that began with the one before it end with it."""
    directory = Path(body.directory)
    if not directory.is_absolute():
        raise ApiError(400, "The directory has to be an absolute path.", param="directory", code="invalid_value")
    async with audited(current, who, "add adapter", name) as report:
        new, old = await adapters.add(name, directory)
        result = "added" if old is None else "unchanged" if new is old else "replaced"
        report |= {"result": result, "name": name, "revision": new.revision, "previous": old and old.revision}
    return report


@router.delete("/{name}")
async def remove_adapter(name: str, who: Who, adapters: Adapters, current: Current) -> dict[str, Any]:
    """Take an adapter's name away, and answer once the last request that uses it has ended."""
    async with audited(current, who, "remove adapter", name) as report:
        old, seconds = await adapters.remove(name)
        report |= {"result": "removed", "name": name, "revision": old.revision, "seconds": round(seconds, 3)}
    return report


@asynccontextmanager
async def audited(current: Service, who: str, what: str, name: str) -> AsyncIterator[dict[str, Any]]:
    """An action on an adapter, whose report the block fills in. Raises ApiError, StoreError."""
    number = await current.deployment.begin_action(who, what, name[:100], current.replica)
    report: dict[str, Any] = {"result": "failed"}
    message = ""
    try:
        yield report
    except (AdapterRefused, UnknownAdapter) as error:
        report["result"], message = "refused", str(error)
        unknown = isinstance(error, UnknownAdapter)
        code = "adapter_not_found" if unknown else "adapter_invalid"
        raise ApiError(404 if unknown else 422, message, param="name" if unknown else "directory", code=code) from None
    except StoreError as error:
        message = str(error)
        raise
    finally:
        with suppress(StoreError):
            await current.deployment.end_action(number, report["result"], message)
