"""Reading rows into values: who may see what, and how pages and histories are cut. No transaction begins here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.conversations.errors import NotFound
from server.conversations.tables import ConversationRow, ItemRow, TurnRow
from server.conversations.values import Conversation, Item, Order, Page, Speaker, Turn, Usage, is_id

PART_OF_CONVERSATION = ("complete", "incomplete")
"""A failed turn said nothing: it can be retrieved by its response id, and is no part of the conversation."""
ENDED = (*PART_OF_CONVERSATION, "failed")


def kept(now: float, ttl: float | None) -> ColumnElement[bool]:
    """Conversations that have not expired, by their own time to live or by the store's `ttl` (seconds)."""
    own = or_(ConversationRow.expires_at.is_(None), ConversationRow.expires_at > now)
    return own if ttl is None else and_(own, ConversationRow.active_at > now - ttl)


def kept_turn(now: float, ttl: float | None) -> ColumnElement[bool]:
    """Turns of kept conversations, and turns without one that are younger than the store's `ttl`."""
    alone: ColumnElement[bool] = TurnRow.conversation_number.is_(None)
    if ttl is not None:
        alone = and_(alone, TurnRow.created_at > now - ttl)
    numbers = select(ConversationRow.number).where(kept(now, ttl))
    return or_(alone, TurnRow.conversation_number.in_(numbers))


async def find_conversation(
    session: AsyncSession, owner: str, conversation_id: str, now: float, ttl: float | None, *, lock: bool = False
) -> ConversationRow:
    """The owner's conversation, with its row locked on request. Raises NotFound."""
    query = select(ConversationRow).where(ConversationRow.owner == owner, ConversationRow.id == conversation_id)
    query = query.where(kept(now, ttl))
    row = await session.scalar(query.with_for_update() if lock else query) if is_id(conversation_id) else None
    if row is None:
        raise NotFound("conversation")
    return row


async def find_turn(session: AsyncSession, owner: str, response_id: str, now: float, ttl: float | None) -> TurnRow:
    """The owner's ended turn. Raises NotFound, for a running one too."""
    query = select(TurnRow).where(TurnRow.owner == owner, TurnRow.response_id == response_id)
    query = query.where(TurnRow.status.in_(ENDED), kept_turn(now, ttl))
    row = await session.scalar(query) if is_id(response_id) else None
    if row is None:
        raise NotFound("response")
    return row


def conversation_value(row: ConversationRow, ttl: float | None) -> Conversation:
    ends = [row.expires_at] if row.expires_at is not None else []
    if ttl is not None:
        ends.append(row.active_at + ttl)
    return Conversation(row.id, row.created_at, dict(row.labels), min(ends, default=None))


def item_value(row: ItemRow, turn_status: str) -> Item:
    incomplete = row.is_reply and turn_status == "incomplete"
    return Item(row.id, cast(Speaker, row.speaker), row.value, "incomplete" if incomplete else "completed")


def _turn_value(row: TurnRow, conversation_id: str | None, items: Iterable[ItemRow]) -> Turn:
    usage = None
    if row.input_tokens is not None:
        usage = Usage(row.input_tokens, row.output_tokens or 0, row.cached_tokens or 0)
    inputs, reply = [], None
    for item in items:
        value = item_value(item, row.status)
        if item.is_reply:
            reply = value
        else:
            inputs.append(value)
    return Turn(
        response_id=row.response_id,
        conversation_id=conversation_id,
        status=cast(Any, row.status),
        inputs=tuple(inputs),
        reply=reply,
        language=row.language,
        checkpoint=row.checkpoint,
        usage=usage,
        created_at=row.created_at,
        ended_at=row.ended_at or row.created_at,
        metadata=dict(row.labels),
        details=dict(row.details),
    )


async def load_turns(session: AsyncSession, numbers: Select[int]) -> tuple[Turn, ...]:
    """The turns with these numbers, oldest first, with their items."""
    items: dict[int, list[ItemRow]] = {}
    for item in await session.scalars(select(ItemRow).where(ItemRow.turn_number.in_(numbers)).order_by(ItemRow.number)):
        items.setdefault(item.turn_number, []).append(item)
    rows = await session.execute(
        select(TurnRow, ConversationRow.id)
        .outerjoin(ConversationRow, ConversationRow.number == TurnRow.conversation_number)
        .where(TurnRow.number.in_(numbers))
        .order_by(TurnRow.number)
        .execution_options(populate_existing=True)
    )
    return tuple(_turn_value(row, conversation_id, items.get(row.number, [])) for row, conversation_id in rows)


async def load_turn(session: AsyncSession, number: int) -> Turn:
    """One turn by its number, which must exist."""
    (turn,) = await load_turns(session, select(TurnRow.number).where(TurnRow.number == number))
    return turn


def turns_of(conversation_number: int) -> Select[int]:
    """Numbers of the turns that make up a conversation."""
    return select(TurnRow.number).where(
        TurnRow.conversation_number == conversation_number, TurnRow.status.in_(PART_OF_CONVERSATION)
    )


def turns_up_to(last: int | None) -> Select[int]:
    """Numbers of the turns that lead to the turn `last`, itself included: a chain of previous responses."""
    chain = select(TurnRow.number, TurnRow.previous_number).where(TurnRow.number == last).cte(recursive=True)
    earlier = select(TurnRow.number, TurnRow.previous_number).where(TurnRow.number == chain.c.previous_number)
    chain = chain.union_all(earlier)
    return select(TurnRow.number).where(
        TurnRow.number.in_(select(chain.c.number)), TurnRow.status.in_(PART_OF_CONVERSATION)
    )


def items_of(conversation_number: int) -> Select[ItemRow, str]:
    """Items of a conversation, with their turn's status, in no order yet."""
    return (
        select(ItemRow, TurnRow.status)
        .join(TurnRow, TurnRow.number == ItemRow.turn_number)
        .where(TurnRow.conversation_number == conversation_number, TurnRow.status.in_(PART_OF_CONVERSATION))
    )


def inputs_of(turn_number: int) -> Select[ItemRow, str]:
    """A turn's input items, with its status."""
    return (
        select(ItemRow, TurnRow.status)
        .join(TurnRow, TurnRow.number == ItemRow.turn_number)
        .where(TurnRow.number == turn_number, ItemRow.is_reply.is_(False))
    )


async def find_item(session: AsyncSession, items: Select[ItemRow, str], item_id: str) -> tuple[ItemRow, str]:
    """One of `items` by id. Raises NotFound."""
    found = (await session.execute(items.where(ItemRow.id == item_id))).first() if is_id(item_id) else None
    if found is None:
        raise NotFound("item")
    return found[0], found[1]


async def load_page(
    session: AsyncSession, items: Select[ItemRow, str], after: str | None, limit: int, order: Order
) -> Page:
    """`limit` of `items` in `order`, beginning after the item `after`. Raises NotFound when there is no such item."""
    if after is not None:
        last, _ = await find_item(session, items, after)
        items = items.where(ItemRow.number > last.number if order == "asc" else ItemRow.number < last.number)
    number = ItemRow.number.asc() if order == "asc" else ItemRow.number.desc()
    rows = (await session.execute(items.order_by(number).limit(limit + 1))).all()
    return Page(tuple(item_value(row, status) for row, status in rows[:limit]), len(rows) > limit)
