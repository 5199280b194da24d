"""/v1/conversations and their items, as the official client speaks them. None of it needs the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request

from server.auth import require_key
from server.conversations.idempotency import idempotency
from server.conversations.items import conversation_json, item_json, page_json
from server.conversations.requests import ConversationCreate, ConversationUpdate, ItemsCreate
from server.conversations.store import Store
from server.conversations.values import Idempotency, Page
from server.limits import CheckedRoute
from server.service import service

router = APIRouter(route_class=CheckedRoute, tags=["conversations"])


async def opened_store(request: Request) -> Store:
    """FastAPI dependency: the store. A coroutine, because FastAPI sends a plain function to a thread."""
    return service(request).store


Owner = Annotated[str, Depends(require_key)]
Opened = Annotated[Store, Depends(opened_store)]
OnceOnly = Annotated[Idempotency | None, Depends(idempotency)]
After = Annotated[str | None, Query(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


@router.post("/v1/conversations")
async def create_conversation(body: ConversationCreate, owner: Owner, store: Opened, once: OnceOnly) -> dict[str, Any]:
    """Begin a conversation, with messages or without."""
    ttl = body.expires_after.seconds if body.expires_after else None
    items = body.messages
    made = await store.create_conversation(owner, metadata=body.metadata, items=items, ttl=ttl, idempotency=once)
    return conversation_json(made)


@router.get("/v1/conversations/{conversation_id}")
async def retrieve_conversation(conversation_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """One conversation, without its items."""
    return conversation_json(await store.get_conversation(owner, conversation_id))


@router.post("/v1/conversations/{conversation_id}")
async def update_conversation(
    conversation_id: str, body: ConversationUpdate, owner: Owner, store: Opened
) -> dict[str, Any]:
    """Replace a conversation's metadata."""
    return conversation_json(await store.update_conversation(owner, conversation_id, body.metadata))


@router.delete("/v1/conversations/{conversation_id}")
async def delete_conversation(conversation_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """Delete a conversation with everything in it, for good."""
    await store.delete_conversation(owner, conversation_id)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.post("/v1/conversations/{conversation_id}/items")
async def create_items(
    conversation_id: str, body: ItemsCreate, owner: Owner, store: Opened, once: OnceOnly
) -> dict[str, Any]:
    """Append messages; waits for a turn that runs, or answers 409."""
    return page_json(Page(await store.add_items(owner, conversation_id, body.messages, idempotency=once), False))


@router.get("/v1/conversations/{conversation_id}/items")
async def list_items(
    conversation_id: str, owner: Owner, store: Opened, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> dict[str, Any]:
    """A page of messages, the newest first unless `order` is asc."""
    return page_json(await store.list_items(owner, conversation_id, after=after, limit=limit, order=order))


@router.get("/v1/conversations/{conversation_id}/items/{item_id}")
async def retrieve_item(conversation_id: str, item_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """One message."""
    return item_json(await store.get_item(owner, conversation_id, item_id))


@router.delete("/v1/conversations/{conversation_id}/items/{item_id}")
async def delete_item(conversation_id: str, item_id: str, owner: Owner, store: Opened) -> dict[str, Any]:
    """Delete one message for good; the answer is its conversation."""
    return conversation_json(await store.delete_item(owner, conversation_id, item_id))
