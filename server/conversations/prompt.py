"""The prompt of a turn: stored history as messages that render as they did when each turn was new.

Nothing here depends on what comes later in a conversation, so the prompt of one turn is a prefix of the next one's, as
token ids, and the engine finds it in its prefix cache. Only dropping the oldest turns, or another system line, changes
the beginning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from server.conversations.values import Message as StoredMessage
from server.conversations.values import Turn
from server.language import Language
from server.language.guide import NO_DIRECTIVES, Directives, directed
from server.language.hygiene import clean
from server.language.resolve import resolve
from server.vicuna import ROLES, Message, neutralise

AFTER_DROPPING = 0.75
"""How full the prompt may be once turns had to go. The room that is left is room for the next turns: the beginning,
and with it the prefix cache, stays put until it is used up."""
SYSTEM_BYTES, MESSAGE_BYTES = 512, 64
"""More than the default system line takes, and the words and tokens around one message."""


class Asked(NamedTuple):
    """What a new turn adds to its history."""

    messages: tuple[StoredMessage, ...]
    instructions: str | None = None
    language: Literal["auto", "en", "ar"] = "auto"
    guided: bool = True
    """Whether directives ask for the language."""


@dataclass
class Said:
    """One or more messages in a row by one role, and the first and last turn they belong to."""

    role: str
    content: str
    first: int
    last: int
    language: Language | None
    guided: bool


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its newest message, and the language to answer in."""

    system: str | None
    said: tuple[Said, ...]
    language: Language
    begun: tuple[float, ...]
    """When each earlier turn began, the oldest first."""

    @property
    def beginnings(self) -> list[int]:
        """Where the prompt may begin without tearing a turn apart: indexes in `said`, the first is 0."""
        return [
            index
            for index, said in enumerate(self.said)
            if said.role == "user" and (index == 0 or said.first > self.said[index - 1].last)
        ]

    def dropped_before(self, beginning: int) -> int:
        """How many turns a prompt leaves out that begins there."""
        return self.said[beginning].first

    def messages(self, beginning: int = 0) -> list[Message]:
        """Chat messages for the template."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [{"role": said.role, "content": said.content} for said in self.said[beginning:]]


def compose(history: Sequence[Turn], asked: Asked, directives: Directives) -> Prompt:
    """The whole prompt of a turn. Raises ValueError when there is nothing to answer.

    System messages, wherever they stand, make up the system line, each text once; so a client may send its own with
    every turn. A message by the assistant that answers nothing has no place in Vicuna's form and is left out.
    """
    spoken = [turn for turn in history if not _said_nothing(turn)]
    system = _system_line(spoken, asked)
    said = _joined(_everything_said(spoken, asked))
    if not said or said[-1].role != "user" or said[-1].last != len(spoken):
        raise ValueError("the last message must be the user's: there is nothing to answer")
    language = _guide(system, said, asked, directives)
    return Prompt(system, tuple(said), language, tuple(turn.created_at for turn in spoken))


def _said_nothing(turn: Turn) -> bool:
    """A turn that broke before a word of the reply was out: whoever asked has asked again, or given up."""
    return turn.status == "incomplete" and turn.reply is not None and not turn.reply.value


def _system_line(history: Iterable[Turn], asked: Asked) -> str | None:
    stored = [item.value for turn in history for item in turn.inputs if item.speaker == "system"]
    new = [message.value for message in asked.messages if message.speaker == "system"]
    texts = [asked.instructions] if asked.instructions else []
    return "\n\n".join(dict.fromkeys(_harmless(text) for text in [*texts, *stored, *new])) or None


def _harmless(text: str) -> str:
    return neutralise(clean(text).text)


def _everything_said(history: Sequence[Turn], asked: Asked) -> Iterator[Said]:
    for index, turn in enumerate(history):
        language = cast(Language | None, turn.language)
        guided = bool(turn.details.get("guided", True))
        for item in (*turn.inputs, *([turn.reply] if turn.reply else [])):
            yield Said(ROLES[item.speaker], _harmless(item.value), index, index, language, guided)
    for message in asked.messages:
        yield Said(ROLES[message.speaker], _harmless(message.value), len(history), len(history), None, asked.guided)


def _joined(everything: Iterable[Said]) -> list[Said]:
    """What users and assistant said by turns, a user first."""
    joined: list[Said] = []
    for said in everything:
        if joined and joined[-1].role == said.role:
            before = joined[-1]
            before.content += "\n\n" + said.content
            before.last, before.language, before.guided = said.last, said.language, said.guided
        elif said.role == "user" or (said.role == "assistant" and joined):
            joined.append(said)
    return joined


def _guide(system: str | None, said: list[Said], asked: Asked, directives: Directives) -> Language:
    """Add each user message's directive; the language of the newest one."""
    plain = [] if system is None else [{"role": "system", "content": system}]
    language: Language = "en"
    for index, one in enumerate(said):
        plain.append({"role": one.role, "content": one.content})
        if one.role != "user":
            continue
        newest = index == len(said) - 1
        answered_in = one.language if _is_answered(said, index) else None
        language = answered_in or resolve(plain, asked.language if newest else "auto")
        one.content = directed(one.content, language, directives if one.guided else NO_DIRECTIVES)
    return language


def _is_answered(said: list[Said], index: int) -> bool:
    """Whether this user message is the one its turn's reply answered, and not an earlier one of several."""
    later = said[index + 1 : index + 3]
    return len(later) > 0 and (len(later) == 1 or later[1].first > said[index].last)


class Fitted(NamedTuple):
    """Messages that leave room for a reply, and how many of the oldest turns they leave out."""

    messages: list[Message]
    dropped: int


async def fit(
    prompt: Prompt, room: int, count: Callable[[list[Message]], Awaitable[int]], dropped_before: int = 0
) -> Fitted:
    """Drop the oldest whole turns until `room` tokens hold the prompt; the newest turn always stays.

    `count` says how many tokens messages are; `dropped_before` is how many turns were left out before and stay out.
    """
    beginnings = [b for b in prompt.beginnings if prompt.dropped_before(b) >= dropped_before] or prompt.beginnings[-1:]
    first = prompt.messages(beginnings[0])
    if _surely_fits(first, room) or len(beginnings) == 1 or await count(first) <= room:
        return Fitted(first, prompt.dropped_before(beginnings[0]))
    low, high = 1, len(beginnings) - 1
    while low < high:
        middle = (low + high) // 2
        if await count(prompt.messages(beginnings[middle])) <= room * AFTER_DROPPING:
            high = middle
        else:
            low = middle + 1
    return Fitted(prompt.messages(beginnings[low]), prompt.dropped_before(beginnings[low]))


def _surely_fits(messages: list[Message], room: int) -> bool:
    """Whether even one token a byte would fit: most prompts, and then nothing has to be counted."""
    return SYSTEM_BYTES + sum(len(m["content"].encode()) + MESSAGE_BYTES for m in messages) <= room
