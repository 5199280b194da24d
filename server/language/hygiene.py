"""Text hygiene on the way in: one canonical spelling of what the user sees, and nothing that the user can't see.

What is changed is counted by kind, so that a log line can tell how odd a text was without quoting it.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

_LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85]")
_INVISIBLE = re.compile(
    "(?P<controls>[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb])"
    "|(?P<bidi>[\u202a-\u202e\u2066-\u2069])"
    "|(?P<tags>[\U000e0000-\U000e007f\U000e0100-\U000e01ef])"
    # Soft hyphen, grapheme joiner, directional marks, word joiner, invisible operators, byte order mark, and variation
    # selectors that do not choose between the text and the emoji form of the sign before them.
    "|(?P<zero_width>[\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2060-\u2065\u206a-\u206f\ufeff\ufe00-\ufe0d]"
    "|(?<![#*0-9\u00a9\u00ae\u2000-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f])"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# U+FD3E, U+FD3F (ornate brackets) and the byte order mark lie outside what these ranges can fold.
_PRESENTATION_FORMS = re.compile("[\ufb50-\ufd3d\ufd50-\ufdfc\ufe70-\ufefc]")

_SHAPED = "\u0620-\u074a\u0750-\u077f\u08a0-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17d3\u1820-\u1878"
_PICTURES = "\u2190-\u2bff\u3030\U0001f000-\U0001faff"
_JOINERS = re.compile("[\u200c\u200d]+")
_SHAPED_CHARACTER = re.compile(f"[{_SHAPED}]")
_PICTURE_CHARACTER = re.compile(f"[{_PICTURES}\ufe0f]")

# Any character that some step below might change. Ordinary English and Arabic have none.
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufb50-\ufdff\ufe00-\ufe0f\ufe70-\ufeff\ufff9-\ufffb\U000e0000-\U000e01ef]"
)
_PILE = re.compile(r"[^\w\s]{31}")  # holds wherever a run of marks is too long, and is quicker to look for
_MOST_STACKED_MARKS = 30  # UAX #15, Stream-Safe Text Format: no language stacks more on one letter.


class Cleaned(NamedTuple):
    """A text after hygiene, and how many characters of which kind were changed."""

    text: str
    counts: Counter[str]


def clean(text: str) -> Cleaned:
    """Return `text` in NFC, Arabic presentation forms folded, invisible characters removed. Idempotent.

    Digits of every script, superscripts and other compatibility characters stay as they are. Joiners stay where they
    change what is seen: between letters of Arabic and Indic scripts, and inside emoji. Lines end in "\\n" only.
    Lone surrogates, which no encoder accepts, become U+FFFD. Kinds in the counts: line_breaks, controls, bidi, tags,
    zero_width, surrogates, presentation_forms, stacked_marks, and composed (1 when NFC changed the text).
    """
    counts: Counter[str] = Counter()
    if _SUSPECT.search(text):
        text = _without_invisible(text, counts)
    if not text.isascii():
        text = _composed(text, counts)
    return Cleaned(text, +counts)


def _without_invisible(text: str, counts: Counter[str]) -> str:
    text = _replace(_LINE_BREAKS, "\n", text, counts, "line_breaks")
    text = _replace(_SURROGATES, "\ufffd", text, counts, "surrogates")
    # A selector may stand behind another one: removing the first must not leave the second to the next call.
    before = None
    while before != text:
        before = text
        text = _INVISIBLE.sub(lambda match: _counted(match, counts), text)
    text = _PRESENTATION_FORMS.sub(lambda match: _folded(match, counts), text)
    return _JOINERS.sub(lambda match: _joiner(match, counts), text)


def _replace(pattern: re.Pattern[str], new: str, text: str, counts: Counter[str], kind: str) -> str:
    text, number = pattern.subn(new, text)
    if number:
        counts[kind] += number
    return text


def _counted(match: re.Match[str], counts: Counter[str]) -> str:
    counts[str(match.lastgroup)] += 1
    return ""


def _folded(match: re.Match[str], counts: Counter[str]) -> str:
    form = match[0]
    # A mark that stands alone folds to a space and the mark; the space was never typed.
    letters = unicodedata.normalize("NFKC", form).strip(" ")
    counts["presentation_forms"] += letters != form
    return letters


def _joiner(match: re.Match[str], counts: Counter[str]) -> str:
    before, after = match.string[: match.start()][-1:], match.string[match.end() : match.end() + 1]
    shaped = _SHAPED_CHARACTER.match(before) and _SHAPED_CHARACTER.match(after)
    pictured = _PICTURE_CHARACTER.match(before) and _PICTURE_CHARACTER.match(after)
    kept = match[0][-1] if shaped or (pictured and match[0][-1] == "\u200d") else ""
    counts["zero_width"] += len(match[0]) - len(kept)
    return kept


def _composed(text: str, counts: Counter[str]) -> str:
    # NFC takes quadratic time over one long run of marks (seconds for 60,000 of them), so runs are cut before it.
    cut = 0
    if _PILE.search(text):
        text, cut = _stacked_marks().subn(r"\1", text)
    composed = text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)
    if cut:
        counts["stacked_marks"] += cut
    if composed != text:
        counts["composed"] += 1
    return composed


@lru_cache(maxsize=1)
def _stacked_marks() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.combining(chr(code)))
    return re.compile(f"([{marks}]{{{_MOST_STACKED_MARKS}}})[{marks}]+")
