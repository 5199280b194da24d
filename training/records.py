"""Vicuna records, `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`.

The format of the paper's section 3.2, validated one record at a time. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from training.errors import Refused

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "ai": "assistant", "assistant": "assistant"}
Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


def _role(speaker: object) -> object:
    return ROLES.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker


class Turn(BaseModel):
    model_config = ConfigDict(frozen=True)

    role: Annotated[Role, BeforeValidator(_role), Field(alias="from")]
    value: str = Field(strict=True)

    @model_validator(mode="after")
    def _says_something(self) -> Turn:
        if not self.value.strip():
            raise ValueError("empty turn")
        return self


class Record(BaseModel):
    """One conversation. Other keys (an id, a source, a language) are allowed and ignored."""

    model_config = ConfigDict(frozen=True)

    conversations: tuple[Turn, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _alternates(self) -> Record:
        turns = self.conversations[1:] if self.conversations[0].role == "system" else self.conversations
        for index, turn in enumerate(turns):
            expected = "assistant" if index % 2 else "user"
            if turn.role != expected:
                raise ValueError(f"turn {index + 1} is by {turn.role}, expected {expected}")
        if len(turns) % 2 or not turns:
            raise ValueError("the last turn is not the assistant's")
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation as chat messages, in the form chat templates take."""
        return [Message(role=turn.role, content=turn.value.strip()) for turn in self.conversations]


@dataclass(frozen=True)
class Raw:
    """One entry as it was read: `place` is its file and line (or row), `error` says why it could not be decoded."""

    place: str
    value: Any = None
    error: str | None = None


def parse(raw: Raw) -> Record:
    """The record in `raw`. Raises ValueError with the reason when it is not a valid one."""
    if raw.error:
        raise ValueError(raw.error)
    try:
        return Record.model_validate(raw.value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {reason}" if where else reason) from None


class TooManyRejected(Refused):
    """More records are bad than the configuration allows."""


@dataclass
class Rejects:
    """Counts bad records and writes each to `path` with its place and reason; past `allowed` (a share), stops the run.

    The share is judged from 1,000 records on and again at the end, so that a bad first line does not decide alone.
    """

    path: Path
    allowed: float
    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def filter(self, entries: Iterable[Raw], check: Callable[[Record], None]) -> Iterator[Record]:
        """The valid records of `entries`, in order. `check` may refuse one with a ValueError.

        Raises TooManyRejected, and Refused when there is no entry at all.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            for raw in entries:
                self.seen += 1
                try:
                    record = parse(raw)
                    check(record)
                except ValueError as error:
                    reason = str(error)
                    self.reasons[reason] += 1
                    entry = {"place": raw.place, "reason": reason, "record": raw.value}
                    file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
                    file.flush()
                    if self.seen >= 1000:
                        self._judge()
                else:
                    yield record
        self._judge()

    def _judge(self) -> None:
        if not self.seen:
            raise Refused("the sources hold no record")
        if self.count > self.allowed * self.seen:
            worst, times = self.reasons.most_common(1)[0]
            raise TooManyRejected(
                f"{self.count} of {self.seen} records are bad, more than {self.allowed:.1%}; "
                f"most often ({times}): {worst}. See {self.path}"
            )


def write(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write `records` as JSON lines; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
