"""What the store takes and gives: plain values, and ids that cannot be guessed."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Speaker = Literal["system", "human", "gpt"]
Ending = Literal["complete", "incomplete", "failed"]
Order = Literal["asc", "desc"]

ID = re.compile(r"(?:conv|resp|msg)_[0-9a-f]{48}")


def new_id(prefix: Literal["conv", "resp", "msg"]) -> str:
    """An id with OpenAI's prefix and 192 random bits."""
    return f"{prefix}_{secrets.token_hex(24)}"


def is_id(value: str) -> bool:
    """Whether `value` can be an id at all; what cannot (a NUL, say) never reaches the database."""
    return ID.fullmatch(value) is not None


class Message(NamedTuple):
    """A message to store, in Vicuna form."""

    speaker: Speaker
    value: str


class Usage(NamedTuple):
    """Tokens of one turn, as the engine counted them."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


class Idempotency(NamedTuple):
    """A client's key, and a digest of the whole request (route, path and body) it was first sent with."""

    key: str
    body_digest: str

    @property
    def key_digest(self) -> str:
        """A key may be long, or a secret of the client's; only this is stored."""
        return hashlib.sha256(self.key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Times are seconds since the Unix epoch; `expires_at` is when it goes unless another turn comes."""

    id: str
    created_at: float
    metadata: dict[str, str]
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Item:
    """A stored message. Only a reply can be incomplete."""

    id: str
    speaker: Speaker
    value: str
    status: Literal["completed", "incomplete"]


class Page(NamedTuple):
    """Items in the order that was asked for, and whether more follow."""

    items: tuple[Item, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """An ended turn. `response_id` is None for items added by hand; `reply` is None there and when it was deleted."""

    response_id: str | None
    conversation_id: str | None
    status: Ending
    inputs: tuple[Item, ...]
    reply: Item | None
    language: str | None
    checkpoint: str | None
    usage: Usage | None
    created_at: float
    ended_at: float
    metadata: dict[str, str]
    details: dict[str, Any]


@dataclass(eq=False)
class RunningTurn:
    """A turn that this process has begun and must end.

    The caller says what it sends with `sent`, and fills in `language`, `checkpoint` and `details` as they become known;
    they are written with the next checkpoint, and when the turn ends. A handle that is dropped without an end stops
    being renewed, so its conversation is free again when the lease has run out.
    """

    number: int = field(repr=False)
    response_id: str
    message_id: str
    conversation_id: str | None
    created_at: float
    waited: float
    """Seconds spent waiting for an earlier turn of the same conversation."""
    inputs: tuple[Item, ...] = field(repr=False)
    history: tuple[Turn, ...] = field(repr=False)
    """Complete and incomplete turns before this one, oldest first."""
    metadata: dict[str, str] = field(repr=False)
    details: dict[str, Any] = field(repr=False)
    language: str | None = None
    checkpoint: str | None = None
    renew_at: float = field(default=0.0, repr=False)
    saved_pieces: int = field(default=0, repr=False)
    pieces: list[str] = field(default_factory=list, repr=False)

    def sent(self, text: str) -> None:
        """Note text that was handed to the client's connection."""
        self.pieces.append(text)

    @property
    def sent_text(self) -> str:
        return "".join(self.pieces)

    def ended(self, status: Literal["complete", "incomplete"], text: str, usage: Usage | None, now: float) -> Turn:
        """The turn as it is stored once it has ended so."""
        reply = Item(self.message_id, "gpt", text, "completed" if status == "complete" else "incomplete")
        return Turn(
            response_id=self.response_id,
            conversation_id=self.conversation_id,
            status=status,
            inputs=self.inputs,
            reply=reply,
            language=self.language,
            checkpoint=self.checkpoint,
            usage=usage,
            created_at=self.created_at,
            ended_at=now,
            metadata=self.metadata,
            details=dict(self.details),
        )


def checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of `metadata`; OpenAI's limits. Raises ValueError: over 16 pairs, keys over 64, values over 512."""
    pairs = dict(metadata or {})
    if len(pairs) > 16:
        raise ValueError("metadata holds at most 16 pairs")
    for key, value in pairs.items():
        if not (isinstance(key, str) and isinstance(value, str) and len(key) <= 64 and len(value) <= 512):
            raise ValueError("metadata keys are strings of at most 64 characters, values of at most 512")
    return pairs
