"""Vicuna v1.1 conversations: records, chat messages, and text that cannot forge a turn.

A prompt reads `SYSTEM USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:` (FastChat's `vicuna_v1.1`; the template itself
is a file of each checkpoint). Turns are told apart by plain words and one special token, so text from outside is
checked for both before it is rendered.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": str}`"""

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "AI": "assistant"}
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def from_record(record: Mapping[str, Any]) -> list[Message]:
    """`{"conversations": [{"from": "human" | "gpt", "value": str}, ...]}` to chat messages.

    The paper's `AI` is read as `gpt`; one leading `system` entry is kept; turns alternate and a human begins. Raises
    ValueError that names the turn.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("a record needs a non-empty list under 'conversations'")
    messages = [_message(number, turn) for number, turn in enumerate(turns, 1)]
    first_turn = 1 if messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[first_turn:]):
        expected = "user" if index % 2 == 0 else "assistant"
        if message["role"] != expected:
            number = first_turn + index + 1
            raise ValueError(f"turn {number}: expected {SPEAKERS[expected]}, found {SPEAKERS[message['role']]}")
    if len(messages) == first_turn:
        raise ValueError("a record needs a turn by human")
    return messages


def _message(number: int, turn: object) -> Message:
    if not isinstance(turn, Mapping) or set(turn) != {"from", "value"}:
        raise ValueError(f"turn {number}: expected exactly 'from' and 'value'")
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ValueError(f"turn {number}: 'from' must be human, gpt or AI")
    if not isinstance(turn["value"], str) or not turn["value"].strip():
        raise ValueError(f"turn {number}: 'value' must be text")
    return {"role": role, "content": turn["value"]}


def to_record(messages: Iterable[Message]) -> dict[str, list[dict[str, str]]]:
    """Chat messages to a record: the inverse of `from_record`."""
    return {"conversations": [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in messages]}


def normalise(messages: Sequence[Message]) -> list[Message]:
    """Messages as the template takes them: an optional system message, then user and assistant by turns, neutralised.

    Consecutive messages of one role become one, a blank line between them. Raises ValueError when a system message
    follows a turn, or when the first or last turn is not the user's.
    """
    joined: list[Message] = []
    for message in messages:
        role, content = message["role"], neutralise(message["content"])
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += "\n\n" + content
        elif joined and role == "system":
            raise ValueError("system messages must come before the first turn")
        else:
            joined.append({"role": role, "content": content})
    turns = [message["role"] for message in joined if message["role"] != "system"]
    if not turns or turns[0] != "user":
        raise ValueError("the first turn must be the user's")
    if turns[-1] != "user":
        raise ValueError("the last turn must be the user's: there is nothing to answer")
    return joined


# Letters of other scripts that look like the letters and signs of the markers below.
_LOOKALIKES = dict(zip("АВЕІЅЕТՏՍԱΑΕΙΝΤꓢꓔꓵ։∶꞉˸〈〉‹›⟨⟩❮❯⁄∕", "ABEISETSUAAEINTSTU::::<><><><>//", strict=True))
_INVISIBLE = {"Mn", "Me", "Cf", "Cc", "Cs"}


class _Fold(dict[int, str]):
    """Code point to the one ASCII character it looks like; invisible ones to NUL; the rest to themselves."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        folded = char
        if unicodedata.category(char) in _INVISIBLE and char not in "\n\t":
            folded = "\0"
        elif char in _LOOKALIKES:
            folded = _LOOKALIKES[char]
        elif len(compatible := unicodedata.normalize("NFKC", char)) == 1 and compatible.isascii():
            folded = compatible
        if len(self) < 10_000:
            self[code] = folded
        return folded


_FOLD = _Fold()


def _spaced(word: str) -> str:
    """A pattern for `word` with invisible characters anywhere inside."""
    return r"\0*".join(re.escape(char) for char in word)


def _any(words: Iterable[str]) -> str:
    return "|".join(_spaced(word) for word in words)


_SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", "<<SYS>>", "<</SYS>>"]
_BRACKETED = ["INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "TOOL_CONTENT", "PREFIX"]
_MARKERS = re.compile(
    rf"(?P<token>(?i:{_any(_SPECIAL_TOKENS)})"
    rf"|\[\0*(?:/\0*)?(?:{_any(_BRACKETED)})\0*\]"
    r"|<\0*\|[^|<>\n]{1,40}\|\0*>)"
    # The upper-case words are markers anywhere, even inside a word: tokenizers cut SUPERUSER: into SUPER and USER:.
    # In other cases and by other names they are only looked at where a chat log would have them.
    rf"|(?P<role>(?:{_any(['USER', 'ASSISTANT', 'SYSTEM'])})\0*):"
    rf"|^[ \t\0]*(?P<line>(?i:{_any(['user', 'assistant', 'system', 'human', 'gpt'])})\0*):",
    re.MULTILINE,
)
_SIGNS = "<[:＜［：﹤︰﹕" + "".join(char for char, seen_as in _LOOKALIKES.items() if seen_as in "<:")
_POSSIBLE = re.compile(f"[{re.escape(_SIGNS)}]")


def neutralise(text: str) -> str:
    """`text` with a space put inside everything that reads as a special token or a role marker: `< /s>`, `USER :`.

    Look-alikes count: other scripts' letters, full-width forms, invisible characters in between. Other text comes back
    unchanged; neutralising twice changes nothing more.
    """
    if not _POSSIBLE.search(text):
        return text
    # Folding maps one character to one, so places in the folded text are places in the text.
    pieces, last = [], 0
    for match in _MARKERS.finditer(text.translate(_FOLD)):
        cut = match.start() + 1 if match["token"] else match.end() - 1
        pieces += [text[last:cut], " "]
        last = cut
    return "".join([*pieces, text[last:]])
