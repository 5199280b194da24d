"""The tables. A change here needs a numbered migration; a test compares the two.

Lookups go through indexes that begin with the owner, so an id of somebody else's misses exactly as an unknown one does.
Items are ordered by their number: turns of one conversation are begun one after the other, and a turn's items, its
reply included, are inserted together when it begins.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Dialect, Double, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

NUMBER = BigInteger().with_variant(Integer(), "sqlite")
RUNNING = text("status = 'in_progress'")
ALONE = text("conversation_number IS NULL")
SURROGATE = re.compile("[\ud800-\udfff]")


class Json(TypeDecorator[Any]):
    """Any JSON value as text. PostgreSQL's text cannot hold NUL: as a JSON string, every str comes back as it was."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        # Arabic stays readable and two bytes a letter; half a surrogate pair has no UTF-8 and is escaped.
        encoded = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    pass


class ConversationRow(Base):
    """Times are seconds since the Unix epoch, by the database's clock. `expires_at` is `active_at` plus `ttl`."""

    __tablename__ = "conversations"
    __table_args__ = (
        Index("conversations_by_owner", "owner", "id", unique=True),
        Index("conversations_by_activity", "active_at"),
        Index("conversations_by_expiry", "expires_at"),
    )

    number: Mapped[int] = mapped_column(NUMBER, primary_key=True)
    id: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str] = mapped_column(Text)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    created_at: Mapped[float] = mapped_column(Double)
    active_at: Mapped[float] = mapped_column(Double)
    ttl: Mapped[float | None] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)


class TurnRow(Base):
    """A request and its reply, or items added by hand (no `response_id`).

    While a turn runs it is the claim on its conversation, for as long as its lease is renewed: `turns_one_running` lets
    the database itself refuse a second one.
    """

    __tablename__ = "turns"
    __table_args__ = (
        CheckConstraint("status IN ('in_progress', 'complete', 'incomplete', 'failed')", name="turns_status"),
        Index("turns_by_owner", "owner", "response_id", unique=True),
        Index("turns_by_conversation", "conversation_number", "number"),
        Index("turns_by_previous", "previous_number"),
        Index("turns_one_running", "conversation_number", unique=True, sqlite_where=RUNNING, postgresql_where=RUNNING),
        Index("turns_by_lease", "lease_until", sqlite_where=RUNNING, postgresql_where=RUNNING),
        Index("turns_alone", "created_at", sqlite_where=ALONE, postgresql_where=ALONE),
    )

    number: Mapped[int] = mapped_column(NUMBER, primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    response_id: Mapped[str | None] = mapped_column(String(64))
    conversation_number: Mapped[int | None] = mapped_column(ForeignKey("conversations.number", ondelete="CASCADE"))
    previous_number: Mapped[int | None] = mapped_column(ForeignKey("turns.number", ondelete="SET NULL"))
    status: Mapped[str] = mapped_column(String(16))
    language: Mapped[str | None] = mapped_column(String(16))
    checkpoint: Mapped[str | None] = mapped_column(Text)
    input_tokens: Mapped[int | None]
    output_tokens: Mapped[int | None]
    cached_tokens: Mapped[int | None]
    created_at: Mapped[float] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)
    lease_until: Mapped[float | None] = mapped_column(Double)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    details: Mapped[dict[str, Any]] = mapped_column(Json)


class ItemRow(Base):
    """One message in Vicuna form."""

    __tablename__ = "items"
    __table_args__ = (
        CheckConstraint("speaker IN ('system', 'human', 'gpt')", name="items_speaker"),
        Index("items_by_turn", "turn_number", "id", unique=True),
    )

    number: Mapped[int] = mapped_column(NUMBER, primary_key=True)
    turn_number: Mapped[int] = mapped_column(ForeignKey("turns.number", ondelete="CASCADE"))
    id: Mapped[str] = mapped_column(String(64))
    speaker: Mapped[str] = mapped_column(String(8))
    value: Mapped[str] = mapped_column(Json)
    is_reply: Mapped[bool]


class IdempotencyRow(Base):
    """What a key led to: a turn, or a conversation. The key itself is kept as a digest."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index("idempotency_keys_by_age", "created_at"),
        Index("idempotency_keys_by_conversation", "conversation_number"),
        Index("idempotency_keys_by_turn", "turn_number"),
    )

    owner: Mapped[str] = mapped_column(Text, primary_key=True)
    key_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    body_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Double)
    conversation_number: Mapped[int | None] = mapped_column(ForeignKey("conversations.number", ondelete="CASCADE"))
    turn_number: Mapped[int | None] = mapped_column(ForeignKey("turns.number", ondelete="CASCADE"))
