"""Turns inside a transaction: claim a conversation, write a turn, end it, settle what a dead process left behind.

A turn's row is its claim. Whoever begins one locks the conversation's row first, so of two requests one sees the other;
ending, saving and settling all ask for status `in_progress` in the same statement that changes it, so each turn ends
once and a process whose lease ran out cannot write over what was decided without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import CursorResult, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.conversations import rows
from server.conversations.errors import IdempotencyMismatch, TurnLost
from server.conversations.tables import ConversationRow, IdempotencyRow, ItemRow, TurnRow
from server.conversations.values import Ending, Idempotency, Item, Message, RunningTurn, Turn, Usage, new_id


@dataclass(frozen=True, slots=True)
class Request:
    """What a turn begins with. At most one of `conversation_id` and `previous_response_id` is set."""

    owner: str
    messages: tuple[Message, ...]
    conversation_id: str | None
    previous_response_id: str | None
    metadata: dict[str, str]
    details: dict[str, Any]
    idempotency: Idempotency | None


async def begin(
    session: AsyncSession, request: Request, now: float, ttl: float | None, lease: float
) -> RunningTurn | Turn | None:
    """The turn begun; or the turn that the same request led to before; or None while something else is running.

    Raises NotFound, IdempotencyMismatch.
    """
    conversation = None
    if request.conversation_id is not None:
        found = rows.find_conversation(session, request.owner, request.conversation_id, now, ttl, lock=True)
        conversation = await found
    earlier = await _earlier(session, request.owner, request.idempotency, now)
    if earlier is not None:
        return earlier if isinstance(earlier, Turn) else None
    if conversation is not None and await is_claimed(session, conversation.number, now):
        return None
    if conversation is not None:
        previous = await session.scalar(select(func.max(rows.turns_of(conversation.number).subquery().c.number)))
        history = rows.turns_of(conversation.number)
    elif request.previous_response_id is not None:
        previous = (await rows.find_turn(session, request.owner, request.previous_response_id, now, ttl)).number
        history = rows.turns_up_to(previous)
    else:
        previous, history = None, None
    turns = await rows.load_turns(session, history) if history is not None else ()
    return await _insert(
        session,
        request,
        conversation_number=conversation.number if conversation else None,
        previous=previous,
        history=turns,
        now=now,
        lease=lease,
    )


async def _insert(
    session: AsyncSession,
    request: Request,
    *,
    conversation_number: int | None,
    previous: int | None,
    history: tuple[Turn, ...],
    now: float,
    lease: float,
) -> RunningTurn:
    row = TurnRow(
        owner=request.owner,
        response_id=new_id("resp"),
        conversation_number=conversation_number,
        previous_number=previous,
        status="in_progress",
        created_at=now,
        lease_until=now + lease,
        labels=request.metadata,
        details=request.details,
    )
    session.add(row)
    await session.flush()
    *inputs, reply = await insert_items(session, row.number, [*request.messages, Message("gpt", "")], reply=True)
    await remember(session, request.owner, request.idempotency, now, turn_number=row.number)
    await touch(session, conversation_number, now)
    assert row.response_id is not None
    return RunningTurn(
        number=row.number,
        response_id=row.response_id,
        message_id=reply.id,
        conversation_id=request.conversation_id,
        created_at=now,
        waited=0.0,
        inputs=tuple(inputs),
        history=history,
        metadata=request.metadata,
        details=dict(request.details),
    )


async def insert_items(
    session: AsyncSession, turn_number: int, messages: Sequence[Message], *, reply: bool = False
) -> list[Item]:
    """Write messages as a turn's items; with `reply`, the last one is the model's."""
    items = [Item(new_id("msg"), message.speaker, message.value, "completed") for message in messages]
    # One statement with a list of VALUES: both databases number its rows in that order.
    values = [
        {
            "turn_number": turn_number,
            "id": item.id,
            "speaker": item.speaker,
            "value": item.value,
            "is_reply": reply and item is items[-1],
        }
        for item in items
    ]
    await session.execute(insert(ItemRow).values(values))
    return items


async def add(session: AsyncSession, conversation: ConversationRow, messages: Sequence[Message], now: float) -> TurnRow:
    """Write messages as a complete turn without a response, at the end of a conversation that the caller has locked."""
    previous = await session.scalar(select(func.max(rows.turns_of(conversation.number).subquery().c.number)))
    row = TurnRow(
        owner=conversation.owner,
        conversation_number=conversation.number,
        previous_number=previous,
        status="complete",
        created_at=now,
        ended_at=now,
        labels={},
        details={},
    )
    session.add(row)
    await session.flush()
    await insert_items(session, row.number, messages)
    await touch(session, conversation.number, now)
    return row


async def touch(session: AsyncSession, conversation_number: int | None, now: float) -> None:
    """Start a conversation's time to live anew, as each turn does when it begins."""
    if conversation_number is None:
        return
    mine = update(ConversationRow).where(ConversationRow.number == conversation_number)
    await _changed(session, mine.values(active_at=now, expires_at=now + ConversationRow.ttl))


async def is_claimed(session: AsyncSession, conversation_number: int, now: float) -> bool:
    """Whether a turn of the conversation is running. One whose lease has run out is ended here."""
    mine = TurnRow.conversation_number == conversation_number
    lease_until = await session.scalar(select(TurnRow.lease_until).where(mine, TurnRow.status == "in_progress"))
    if lease_until is None or lease_until > now:
        return lease_until is not None
    await settle(session, now, mine)
    return False


async def settle(session: AsyncSession, now: float, *which: Any) -> int:
    """End turns whose lease has run out, as incomplete with what was saved of them; returns how many."""
    expired = update(TurnRow).where(TurnRow.status == "in_progress", TurnRow.lease_until <= now, *which)
    return await _changed(session, expired.values(status="incomplete", ended_at=now, lease_until=None))


async def _changed(session: AsyncSession, statement: Any) -> int:
    options = {"synchronize_session": False}
    return cast(CursorResult[Any], await session.execute(statement, execution_options=options)).rowcount


async def end(
    session: AsyncSession,
    turn: RunningTurn,
    status: Ending,
    now: float,
    *,
    text: str = "",
    usage: Usage | None = None,
) -> None:
    """Write how a turn ended. Raises TurnLost when it is not running any more."""
    running = update(TurnRow).where(TurnRow.number == turn.number, TurnRow.status == "in_progress")
    values = {
        "status": status,
        "ended_at": now,
        "lease_until": None,
        "language": turn.language,
        "checkpoint": turn.checkpoint,
        "details": turn.details,
        "input_tokens": usage.input_tokens if usage else None,
        "output_tokens": usage.output_tokens if usage else None,
        "cached_tokens": usage.cached_tokens if usage else None,
    }
    if not await _changed(session, running.values(**values)):
        raise TurnLost("the turn was ended or deleted by someone else")
    await _write_reply(session, turn.number, text)


async def save(session: AsyncSession, turns: Iterable[RunningTurn], now: float, lease: float) -> None:
    """Renew the leases of running turns, and write what was sent of each so far."""
    for turn in sorted(turns, key=lambda turn: turn.number):
        pieces = len(turn.pieces)
        running = update(TurnRow).where(TurnRow.number == turn.number, TurnRow.status == "in_progress")
        values = {"lease_until": now + lease, "language": turn.language, "checkpoint": turn.checkpoint}
        if await _changed(session, running.values(**values)) and pieces > turn.saved_pieces:
            await _write_reply(session, turn.number, "".join(turn.pieces[:pieces]))
        turn.saved_pieces = pieces


async def _write_reply(session: AsyncSession, turn_number: int, text: str) -> None:
    reply = update(ItemRow).where(ItemRow.turn_number == turn_number, ItemRow.is_reply.is_(True))
    await _changed(session, reply.values(value=text))


async def drop(session: AsyncSession, row: TurnRow) -> None:
    """Delete a turn; the ones that followed it follow the one before it."""
    followers = update(TurnRow).where(TurnRow.previous_number == row.number)
    await _changed(session, followers.values(previous_number=row.previous_number))
    await _changed(session, delete(TurnRow).where(TurnRow.number == row.number))


async def recall(session: AsyncSession, owner: str, idempotency: Idempotency | None) -> IdempotencyRow | None:
    """What the key led to before, if anything. Raises IdempotencyMismatch when that was another request."""
    if idempotency is None:
        return None
    known = await session.get(IdempotencyRow, (owner, idempotency.key_digest))
    if known is not None and known.body_digest != idempotency.body_digest:
        raise IdempotencyMismatch("the idempotency key was used before, with another request")
    return known


async def remember(
    session: AsyncSession,
    owner: str,
    idempotency: Idempotency | None,
    now: float,
    *,
    turn_number: int | None = None,
    conversation_number: int | None = None,
) -> None:
    """Keep what a key led to. When two requests bring it at once the second one's transaction fails as a Conflict."""
    if idempotency is not None:
        session.add(
            IdempotencyRow(
                owner=owner,
                key_digest=idempotency.key_digest,
                body_digest=idempotency.body_digest,
                created_at=now,
                turn_number=turn_number,
                conversation_number=conversation_number,
            )
        )
        await session.flush()


async def _earlier(
    session: AsyncSession, owner: str, idempotency: Idempotency | None, now: float
) -> Turn | TurnRow | None:
    """The ended turn of the same request; its row while it runs; None when there is none to answer with.

    A turn that ended before anything was sent is no result: it is deleted, and the request may try again.
    """
    known = await recall(session, owner, idempotency)
    if known is None:
        return None
    if known.turn_number is None:
        raise IdempotencyMismatch("the idempotency key was used before, with another request")
    await settle(session, now, TurnRow.number == known.turn_number)
    row = await session.get_one(TurnRow, known.turn_number, populate_existing=True)
    if row.status == "in_progress":
        return row
    turn = await rows.load_turn(session, row.number)
    nothing_sent = turn.reply is not None and not turn.reply.value and turn.status != "complete"
    if nothing_sent or turn.status == "failed":
        session.expunge(known)
        await drop(session, row)
        return None
    return turn
