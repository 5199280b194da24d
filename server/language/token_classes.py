"""What each token of a SentencePiece vocabulary adds to a reply, by script: computed once per tokenizer.

Characters that the vocabulary lacks come as byte tokens (`<0xD9><0xA5>`), so a character is only known at its last
byte. The automaton over UTF-8 below says, after every byte, which scripts the character can still turn out to be.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_OPENING = frozenset("([{\"\u00ab\u2018\u201c\u2039'")
_BREAKS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


class Script(IntEnum):
    """What a character, or a token, is to the guard."""

    NEUTRAL = 0
    """Digits, signs, spaces, emoji; Greek letters too: they stand in names of substances in both languages."""
    LATIN = 1
    ARABIC = 2
    BREAK = 3
    """Ends a line."""
    END = 4
    """Ends the reply."""
    NEVER = 5
    """Other scripts, other special tokens, what is not a character."""


# Where digits, signs and marks belong to both languages, or to none.
_SHARED_BLOCKS = (
    (0x0000, 0x024F), (0x02B0, 0x03FF), (0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0x2000, 0x27FF),
    (0x2900, 0x2BFF), (0xFD3E, 0xFD3F), (0xFE00, 0xFE0F), (0x1F000, 0x1FAFF),
)  # fmt: skip
_LATIN_BLOCKS = ((0x0041, 0x02AF), (0x1E00, 0x1EFF))
_ARABIC_BLOCKS = ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE))


@cache
def script(char: str) -> Script:
    """The script of one character, among those that matter here."""
    if char in _BREAKS:
        return Script.BREAK
    code, category = ord(char), unicodedata.category(char)
    letter = category[0] == "L"
    if (letter or category[0] == "M") and _within(code, _ARABIC_BLOCKS):
        return Script.ARABIC
    if letter and _within(code, _LATIN_BLOCKS) and char != "µ":
        return Script.LATIN
    shared = char == "\t" or (category not in ("Cc", "Cn", "Co", "Cs") and _within(code, _SHARED_BLOCKS))
    return Script.NEUTRAL if shared else Script.NEVER


def _within(code: int, blocks: Iterable[tuple[int, int]]) -> bool:
    return any(first <= code <= last for first, last in blocks)


class Piece(NamedTuple):
    """What one token adds. Letters are of one script: a token that mixes the two is NEVER."""

    script: Script
    letters: int = 0
    starts: int = 0
    """Words that begin inside the token: after a space or a sign of its own."""
    joins: bool = False
    """Whether it begins with a letter, and so continues a word where one is open."""
    tail: int = 0
    """How many letters it ends with: what a word left open has, when that word begins in this token."""
    lower: bool = False
    """Whether its first letter is a lower-case one. Names and abbreviations have capitals; Arabic has no case."""
    opens: bool = False
    """Whether it ends with a bracket or quotation mark that opens a gloss."""
    visible: bool = False


NOTHING = Piece(Script.NEVER)


def piece(text: str) -> Piece:
    """`text` as a token: its script and its words."""
    scripts = [script(char) for char in text]
    kinds = set(scripts) - {Script.NEUTRAL}
    if not text or len(kinds) > 1 or Script.NEVER in kinds:
        return NOTHING
    visible = not text.isspace()
    if kinds <= {Script.BREAK}:
        return Piece(kinds.pop() if kinds else Script.NEUTRAL, opens=text[-1] in _OPENING, visible=visible)
    letters = [kind != Script.NEUTRAL for kind in scripts]
    first = text[letters.index(True)]
    return Piece(
        kinds.pop(),
        letters=sum(letters),
        starts=sum(here and not before for before, here in pairwise(letters)),
        joins=letters[0],
        tail=len(letters) if all(letters) else letters[::-1].index(False),
        lower=first == first.lower(),
        opens=text[-1] in _OPENING,
        visible=True,
    )


class Vocabulary(NamedTuple):
    """A vocabulary as symbols: tokens with the same effect share one. Symbols below 128 are the bytes 0x80 to 0xFF."""

    symbols: list[int]
    """By token id."""
    pieces: list[Piece]
    """By symbol; the bytes have `NOTHING`, as one alone adds nothing."""


def read_vocabulary(tokenizer: Any, size: int, end_ids: Iterable[int]) -> Vocabulary:
    """The first `size` token ids of a Hugging Face tokenizer; ids that it lacks, and special tokens, are `NOTHING`.

    Raises ValueError where the vocabulary is not SentencePiece's with byte fallback, as Mixtral's is.
    """
    texts = [text or "" for text in tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))]
    if sum(bool(_BYTE.fullmatch(text)) for text in texts) < 256 or not any(text.startswith(SPACE) for text in texts):
        raise ValueError("the language guard needs a SentencePiece vocabulary with byte fallback, as Mixtral's is")
    ends, special = set(end_ids), set(tokenizer.all_special_ids)
    numbers: dict[Piece, int] = {}
    symbols = []
    for token, text in enumerate([*texts, *[""] * (size - len(texts))]):
        byte = _BYTE.fullmatch(text)
        code = int(byte[1], 16) if byte else 0
        if code >= 0x80:
            symbols.append(code - 0x80)
            continue
        if token in ends:
            adds = Piece(Script.END)
        elif token in special:
            adds = NOTHING
        else:
            adds = piece(chr(code) if byte else text.replace(SPACE, " "))
        symbols.append(128 + numbers.setdefault(adds, len(numbers)))
    return Vocabulary(symbols, [NOTHING] * 128 + list(numbers))


# --- bytes ------------------------------------------------------------------------------------------------------


class Utf8(NamedTuple):
    """An automaton over the bytes 0x80 to 0xFF; state 0 is between characters.

    A step is the number of the state to go on from or, where the character is complete, its script as `~script`, which
    is negative.
    """

    states: list[tuple[int, ...]]
    reach: list[frozenset[Script]]
    """Which scripts a character can still have, by state."""


_NEVER = ~Script.NEVER
_END_OF_PLANES = 0x20000  # what lies beyond is Chinese, or nothing


@cache
def utf8() -> Utf8:
    """The automaton. States that nothing tells apart are one, so there are a few dozen, not thousands."""
    states: list[tuple[int, ...]] = [()]
    numbers: dict[tuple[int, ...], int] = {}

    def after(prefix: int, missing: int, lowest: int) -> int:
        """The step to a character whose higher bits are `prefix`, with so many continuation bytes to come."""
        first, last = prefix << 6 * missing, (prefix + 1 << 6 * missing) - 1
        if first >= _END_OF_PLANES or last < lowest:
            return _NEVER
        if missing == 0:
            return ~script(chr(prefix))
        steps = (*(after(prefix << 6 | bits, missing - 1, lowest) for bits in range(64)), *[_NEVER] * 64)
        if set(steps) == {_NEVER}:
            return _NEVER
        if steps not in numbers:
            numbers[steps] = len(states)
            states.append(steps)
        return numbers[steps]

    leads = [_NEVER] * 128
    leads[0x42:0x60] = [after(lead & 0x1F, 1, 0x80) for lead in range(0xC2, 0xE0)]
    leads[0x60:0x70] = [after(lead & 0x0F, 2, 0x800) for lead in range(0xE0, 0xF0)]
    leads[0x70:0x75] = [after(lead & 0x07, 3, 0x10000) for lead in range(0xF0, 0xF5)]
    states[0] = tuple(leads)
    return Utf8(states, _reach(states))


def _reach(states: list[tuple[int, ...]]) -> list[frozenset[Script]]:
    @cache
    def scripts(state: int) -> frozenset[Script]:
        return frozenset().union(*(scripts(step) if step >= 0 else {Script(~step)} for step in set(states[state])))

    return [scripts(state) for state in range(len(states))]
