"""Keeps a reply in its language's script while it is decoded: which tokens may come next, for a batch, as tensors.

Drift starts at the beginning of a reply or of a line, so there only letters of the language's own script may stand.
After that, words of the other script (drug names, abbreviations, units) are paid for from a credit that every letter of
the own script earns back. Names in capitals are cheap and lower-case words dear, at most three may follow each other,
and a word that has begun may be finished. English has no such need of Arabic words: there they stand in brackets or
quotation marks. Digits and signs have a bound of their own, or a model that may not drift would escape into them.
Third scripts never pass. The letters of the own script always do, so some token always may come; the end of the reply
may, once something was said.

This module imports torch and no engine; the engine's own base classes are met in `server.engine_guard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.language import Language
from server.language.token_classes import Piece, Script, Vocabulary, utf8

OWED_AT_LINE_START = 3
"""Letters of the own script before the first of the other: the shortest word that sets a language."""
CREDIT = 32
"""Letters of the other script that may be ahead of the own one's: "amoxicillin/clavulanic acid" right after a verb."""
LOWER_CASE_WORD = 4
"""What a lower-case word costs beyond its letters: an ordinary one then takes about two of the own script's."""
RUN = 3
"""Words of the other script in a row; the fourth makes a phrase that no drug name or diagnosis explains."""
LONGEST_WORD = 24
SIGNS = 32
"""Tokens of digits and signs that may be ahead of the own script's letters, each of which makes up for four."""
SIGNS_AT_START = 12
SIGNS_PER_LETTER = 4

UNGUARDED, ENGLISH, ARABIC = 0, 1, 2
CODES: dict[Language, int] = {"en": ENGLISH, "ar": ARABIC}
_SCRIPTS = {ENGLISH: (Script.LATIN, Script.ARABIC), ARABIC: (Script.ARABIC, Script.LATIN)}
"""The own script and the other one, by language code."""


class Effect(NamedTuple):
    """What a token does to the state of a reply: `Piece`, in terms of the own script and the other one."""

    byte: int = 0
    completes: int = 1
    own: int = 0
    other: int = 0
    starts: int = 0
    joins: int = 0
    tail: int = 0
    dear: int = 0
    signs: int = 0
    breaks: int = 0
    opens: int = 0
    visible: int = 0


class Flags(NamedTuple):
    """What may come next, besides letters of the own script."""

    start: bool
    """A word of the other script."""
    join: bool
    """More letters of the other script, right after the last character."""
    signs: bool
    end: bool


_FLAGS = [Flags(*(bool(number & bit) for bit in (8, 4, 2, 1))) for number in range(16)]


class Tables:
    """Everything that depends on the vocabulary alone, as tensors on one device."""

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        symbols = torch.tensor(vocabulary.symbols)
        self.symbols = symbols.to(device)
        count = range(len(vocabulary.pieces))
        effects = [
            [[_effect(vocabulary, code, state, symbol) for symbol in count] for state in _states()]
            for code in (UNGUARDED, ENGLISH, ARABIC)
        ]
        self.effects = torch.tensor(effects, dtype=torch.int32, device=device)
        """[language, UTF-8 state, symbol, field of Effect]"""
        free = [False] * len(vocabulary.pieces)
        rows = [free, *_forbidden(vocabulary, ENGLISH), *_forbidden(vocabulary, ARABIC)]
        self.rows_per_language = len(rows) // 2
        # A sum is several times quicker on a CPU than masked_fill, and bfloat16 keeps the table at 29 MB for Mixtral.
        self.bias = torch.where(torch.tensor(rows)[:, symbols], float("-inf"), 0.0).to(device, torch.bfloat16)
        """[row, token]: minus infinity or nothing. Row 0 is free; then each language has a row for each set of flags,
        and four for each unfinished character."""


def _states() -> range:
    return range(len(utf8().states))


def _effect(vocabulary: Vocabulary, code: int, state: int, symbol: int) -> Effect:
    if code == UNGUARDED:
        return Effect()
    if symbol >= 128:
        return _piece_effect(vocabulary.pieces[symbol], code)
    step = utf8().states[state][symbol]
    if step >= 0:
        return Effect(byte=step, completes=0)
    script = Script(~step)
    return _piece_effect(Piece(script, letters=1, joins=True, tail=1, visible=script != Script.BREAK), code)


def _piece_effect(piece: Piece, code: int) -> Effect:
    own, other = _SCRIPTS[code]
    if piece.script == own:
        return Effect(own=piece.letters, opens=int(piece.opens), visible=1)
    if piece.script == other:
        dear = LOWER_CASE_WORD if piece.lower else 0
        words = Effect(starts=piece.starts, joins=int(piece.joins), tail=piece.tail, dear=dear)
        return words._replace(other=piece.letters, opens=int(piece.opens), visible=1)
    signs, breaks = piece.script in (Script.NEUTRAL, Script.BREAK), piece.script == Script.BREAK
    return Effect(signs=int(signs), breaks=int(breaks), opens=int(piece.opens), visible=int(piece.visible))


def _forbidden(vocabulary: Vocabulary, code: int) -> Iterator[list[bool]]:
    """By symbol, what may not come next: the rows of one language."""
    symbols = range(len(vocabulary.pieces))
    for flags in _FLAGS:
        yield [not _allowed(vocabulary.pieces, symbol, code, flags) for symbol in symbols]
    for state in _states()[1:]:
        for flags in _FLAGS[0:8:2]:
            scripts = _open_scripts(code, flags)
            yield [not (symbol < 128 and _leads_to(state, symbol, scripts)) for symbol in symbols]


def _allowed(pieces: Sequence[Piece], symbol: int, code: int, flags: Flags) -> bool:
    if symbol < 128:
        return _leads_to(0, symbol, _open_scripts(code, flags))
    piece = pieces[symbol]
    if piece.script == Script.END:
        return flags.end
    if piece.script == _SCRIPTS[code][1] and piece.starts:
        return flags.start
    return piece.script in _open_scripts(code, flags)


def _open_scripts(code: int, flags: Flags) -> set[Script]:
    """The scripts that the next character may have."""
    own, other = _SCRIPTS[code]
    signs = {Script.NEUTRAL, Script.BREAK} if flags.signs else set()
    return {own} | signs | ({other} if flags.join else set())


def _leads_to(state: int, byte: int, scripts: set[Script]) -> bool:
    step = utf8().states[state][byte]
    return not scripts.isdisjoint(utf8().reach[step]) if step >= 0 else Script(~step) in scripts


class Guard:
    """The state of many replies, one to a slot, and what each may go on with. A slot holds nothing until `begin`."""

    def __init__(self, tables: Tables, slots: int) -> None:
        self.tables = tables
        self.state = torch.zeros((slots, 9), dtype=torch.int32, device=tables.symbols.device)
        """[slot, (language, UTF-8 state, letters owed, credit, run, word, signs, opened, said)]"""

    def begin(self, slots: Sequence[int], codes: Sequence[int]) -> None:
        """Start a reply in each of `slots`; `codes` are languages as in CODES, or UNGUARDED."""
        begun = [[code, 0, OWED_AT_LINE_START, CREDIT, 0, 0, SIGNS - SIGNS_AT_START, 0, 0] for code in codes]
        device = self.state.device
        self.state[torch.tensor(slots, device=device)] = torch.tensor(begun, dtype=torch.int32, device=device)

    def advance(self, slots: Tensor, tokens: Tensor, fresh: Tensor | None = None) -> None:
        """Take one more token of each reply; where `fresh` is given and false, the reply stays as it is."""
        before = self.state[slots]
        language, byte, owed, credit, run, word, signs, opened, said = before.unbind(1)
        effects = self.tables.effects[language, byte, self.tables.symbols[tokens]]
        next_byte, completes, own, other, starts, joins, tail, dear, sign, breaks, opens, visible = effects.unbind(1)
        new_words = starts + joins * (word == 0)
        continued = (other > 0) & (new_words == 0)
        after = torch.stack(
            [
                language,
                next_byte,
                torch.where(breaks > 0, OWED_AT_LINE_START, (owed - own).clamp_(min=0)),
                (credit + own).clamp_(max=CREDIT) - other - dear * new_words,
                run.masked_fill(own > 0, 0) + new_words,
                torch.where(continued, word + other, torch.where(completes > 0, tail, word)),
                (signs + sign - SIGNS_PER_LETTER * own).clamp_(min=0),
                opened.masked_fill(own > 0, 0) | opens,
                said | visible,
            ],
            dim=1,
        )
        self.state[slots] = after if fresh is None else torch.where(fresh[:, None], after, before)

    def mask(self, slots: Tensor, logits: Tensor) -> Tensor:
        """`logits`, a row for each of `slots`, with minus infinity added in place where a token may not come next."""
        return logits.add_(self.tables.bias[self._rows(slots)])

    def _rows(self, slots: Tensor) -> Tensor:
        language, byte, owed, credit, run, word, signs, opened, said = self.state[slots].unbind(1)
        start = (owed == 0) & (credit > 0) & (run < RUN) & ((language == ARABIC) | (opened > 0))
        join = torch.where(word > 0, word < LONGEST_WORD, start)
        middle = join * 2 + (signs < SIGNS)
        flags = start * 8 + middle * 2 + said
        row = (language - 1) * self.tables.rows_per_language + torch.where(byte == 0, flags, 12 + byte * 4 + middle)
        return torch.where(language == UNGUARDED, 0, row + 1)


def first_refused(tables: Tables, language: Language, tokens: Sequence[int]) -> int | None:
    """Which of `tokens`, decoded by force, the guard would not have let come; None where it lets all of them."""
    guard, slot = Guard(tables, 1), torch.tensor([0])
    guard.begin([0], [CODES[language]])
    for index, token in enumerate(tokens):
        if guard.mask(slot, torch.zeros(1, tables.bias.shape[1]))[0, token] < 0:
            return index
        guard.advance(slot, torch.tensor([token]))
    return None
