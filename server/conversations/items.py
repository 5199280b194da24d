"""OpenAI's conversations and items as JSON, from and to what the store keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.conversations.values import Conversation, Item, Message, Page
from server.requests import Refusal, text_message
from server.vicuna import ROLES, SPEAKERS


def read_items(items: str | Sequence[object], param: str) -> tuple[Message, ...]:
    """A text, or OpenAI's message items, as messages to store. Raises Refusal, which is a ValueError."""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    return tuple(_read(number, item, param) for number, item in enumerate(items))


def _read(number: int, item: object, param: str) -> Message:
    if isinstance(item, Mapping) and item.get("type", "message") != "message":
        raise Refusal(f"{param}.{number}.type must be message: this model reads and writes text only", param)
    message = text_message(number, item, param)
    return Message(SPEAKERS[message["role"]], message["content"])  # type: ignore[arg-type]


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    expires_at = conversation.expires_at
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_at),
        "metadata": conversation.metadata,
        "expires_at": None if expires_at is None else int(expires_at),
    }


def item_json(item: Item) -> dict[str, Any]:
    content: dict[str, Any] = {"type": "input_text", "text": item.value}
    if item.speaker == "gpt":
        content = {"type": "output_text", "text": item.value, "annotations": [], "logprobs": []}
    return {
        "id": item.id,
        "type": "message",
        "role": ROLES[item.speaker],
        "status": item.status,
        "content": [content],
    }


def page_json(page: Page) -> dict[str, Any]:
    data = [item_json(item) for item in page.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }
