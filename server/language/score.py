"""Whether a reply is in the language it should be in: the Language Confusion Benchmark's pass rates, for en and ar.

Source: Marchisio et al., "Understanding and Mitigating Language Confusion in LLMs", arXiv 2406.20052, and its reference
code (for-ai/language-confusion, compute_metrics.py):

- Line-level pass rate (LPR): the share of judged replies in which every judged line is in the expected language. Lines
  under five words are not judged; a reply without a judged line is left out.
- Word-level pass rate (WPR): of the replies that pass by line, the share without a word of the other language.

What is adapted here, because two languages in two scripts need no statistical language identifier on each line:

- A line's language is that of most of its words. Numbers, units, abbreviations in capitals and capitalised Latin names
  do not count in a line that has Arabic words, so "تناول Panadol 500 mg مرتين يوميا" is Arabic.
- A reply of short lines only is judged as one line, so that "نعم" and "Yes, it is." are not left out.
- WPR for Arabic: the benchmark fails a reply on one English dictionary word of four letters or more. Medical Arabic
  names drugs and diseases in Latin letters, so what fails here is an ordinary English word (in lower case, listed in
  `words`), four Latin words in a row, or a word in a third script. Glosses in brackets or quotation marks pass.
- WPR for English, which the benchmark leaves undefined: no word in Arabic or a third script outside such glosses.

On the benchmark's published Arabic replies this gives an LPR of 47.8% for Mixtral-8x7B-Instruct (141 of 295 judged) and
100% for command-r and gpt-4-turbo; on the English ones, 100% for all three.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from os import PathLike
from typing import Literal, NamedTuple

from server.language import Language, words
from server.language.resolve import is_arabic, is_foreign_latin

Observed = Literal["en", "ar", "mixed", "none"]
_LineLanguage = Literal["en", "ar", "other", "none"]

_SHORT_LINE = 5  # words, as in the benchmark
_LATIN_RUN = 4  # Latin words in a row that no drug name or diagnosis explains

_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S{1,64}@\S+")
_GLOSS = re.compile(
    '\\([^()\n]{0,400}\\)|\\[[^\\[\\]\n]{0,400}\\]|"[^"\n]{0,400}"|“[^”\n]{0,400}”|«[^»\n]{0,400}»|`[^`\n]{0,400}`'
)
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|[\u0300-\u036f\u0610-\u061a\u064b-\u0670'’\u200c\u200d-])*")
_ARABIC = re.compile("[\u0620-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff]")
# Latin, Latin-like signs (µ, º, ª) and Greek letters in names of substances (α-blocker) are at home in both languages.
_LATIN = re.compile("[A-Za-z\u00aa-\u024f\u0370-\u03ff\u1e00-\u1eff]")
_UNIT = re.compile(
    r"(?:[mµμkcdn]?(?:g|l|m|mol|eq)|mcg|iu|mmhg|bpm|kcal|cal|hz|ppm|mol|units?|tabs?|caps?|x|c|f)(?:[-/]\w+)?",
    re.IGNORECASE,
)
_ORDINARY = words.ENGLISH_FRAME | words.ENGLISH_GLUE | words.ENGLISH_COMMON


class Verdict(NamedTuple):
    """Whether one reply passes by line and by word; None where there was nothing to judge (WPR needs LPR passed)."""

    lines: bool | None
    words: bool | None


class PassRates(NamedTuple):
    """Counts over many replies, and the two rates made of them (1.0 where nothing was judged)."""

    replies: int = 0
    judged: int = 0
    passed_lines: int = 0
    passed_words: int = 0

    @property
    def line_level(self) -> float:
        return self.passed_lines / self.judged if self.judged else 1.0

    @property
    def word_level(self) -> float:
        return self.passed_words / self.passed_lines if self.passed_lines else 1.0


def observed_language(text: str) -> Observed:
    """The language that all judged lines of `text` are in; "mixed" when they differ, "none" when none is in either."""
    seen = {_line_language(line) for line in _judged_lines(text)} - {"none"}
    if seen == {"ar"}:
        return "ar"
    if seen == {"en"}:
        return "en"
    return "mixed" if seen & {"ar", "en"} else "none"


def judge(reply: str, expected: Language) -> Verdict:
    """Judge one reply against the language it was to be in, as this module's docstring defines."""
    lines = _judged_lines(reply)
    seen = {_line_language(line) for line in lines} - {"none"}
    if not seen:
        return Verdict(None, None)
    if seen != {expected}:
        return Verdict(False, None)
    return Verdict(True, not any(_has_word_error(line, expected) for line in lines))


def pass_rates(verdicts: Iterable[Verdict]) -> PassRates:
    """Add up verdicts; replies without anything to judge count as replies only."""
    given = list(verdicts)
    return PassRates(
        replies=len(given),
        judged=sum(verdict.lines is not None for verdict in given),
        passed_lines=sum(verdict.lines is True for verdict in given),
        passed_words=sum(verdict.words is True for verdict in given),
    )


def score_jsonl(path: str | PathLike[str]) -> dict[Language, PassRates]:
    """Score a JSONL of replies, one `{"expected": "en" | "ar", "reply": "..."}` a line, by expected language.

    Other keys and blank lines are ignored. Raises ValueError, naming the line, where a line is not of that form.
    """
    verdicts: dict[Language, list[Verdict]] = {"en": [], "ar": []}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                expected, reply = _record(line, f"{path}:{number}")
                verdicts[expected].append(judge(reply, expected))
    return {language: pass_rates(given) for language, given in verdicts.items()}


def _record(line: str, where: str) -> tuple[Language, str]:
    try:
        record = json.loads(line)
        expected, reply = record["expected"], record["reply"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected a JSON object with "expected" and "reply"') from error
    if expected not in ("en", "ar") or not isinstance(reply, str):
        raise ValueError(f'{where}: "expected" is "en" or "ar", "reply" is a string')
    return expected, reply


def _judged_lines(text: str) -> list[str]:
    if "/" in text or "@" in text or "www." in text:
        text = _ADDRESS.sub(" ", text)
    lines = text.splitlines()
    if len(lines) == 1:
        return lines
    return [line for line in lines if _is_long(line)] or [" ".join(lines)]


def _is_long(line: str) -> bool:
    return sum(1 for _ in islice(_WORD.finditer(line), _SHORT_LINE)) == _SHORT_LINE


def _line_language(line: str) -> _LineLanguage:
    if line.isascii():
        # No other script to weigh it against: the words need not be told apart.
        return "none" if not _WORD.search(line) else "other" if is_foreign_latin(line) else "en"
    arabic, latin, other = _by_script(line)
    if arabic:
        latin = [word for word in latin if _counts_beside_arabic(word)]
    total = len(arabic) + len(latin) + len(other)
    if not total:
        return "none"
    if len(arabic) * 2 >= total:
        return "ar" if is_arabic(line) else "other"
    if len(latin) * 2 >= total:
        return "other" if is_foreign_latin(line) else "en"
    return "other"


def _by_script(line: str) -> tuple[list[str], list[str], list[str]]:
    arabic: list[str] = []
    latin: list[str] = []
    other: list[str] = []
    for word in _WORD.findall(line):
        if word.isascii():
            latin.append(word)
        else:
            (arabic if _ARABIC.match(word) else latin if _LATIN.match(word) else other).append(word)
    return arabic, latin, other


def _counts_beside_arabic(word: str) -> bool:
    return (word.islower() and len(word) > 1 and not _UNIT.fullmatch(word)) or word.lower() in words.ENGLISH_FRAME


def _has_word_error(line: str, expected: Language) -> bool:
    arabic, latin, other = _by_script(_GLOSS.sub(" , ", line))
    if expected == "en":
        return bool(arabic or other)
    return bool(other) or any(word in _ORDINARY and len(word) > 1 for word in latin) or _has_latin_run(line)


def _has_latin_run(line: str) -> bool:
    run = 0
    for word in re.findall(r"[^\W\d_]+|[^\w\s]|\d+", _GLOSS.sub(" , ", line)):
        run = run + 1 if _LATIN.match(word) and not _UNIT.fullmatch(word) else 0 if word not in "-/'’" else run
        if run >= _LATIN_RUN:
            return True
    return False
