"""Which language to answer in: a pure function of the message list, with no model and no state that shows.

The rules, in order: the call's own `language`; an explicit request in the latest user message; the
language of its sentence that asks, or else of most of its ordinary words; what the conversation spoke before; English.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from server.language import Language, words
from server.language.detect import detect, load
from server.language.explicit import requested_language
from server.language.hygiene import clean

__all__ = ["load", "plain", "resolve"]

# Characters looked at: people ask at the beginning or at the end of a long message, and a name of a language is cheap
# to look for in more.
_REQUEST_ENDS = 4000
_OWN_ENDS = 600

_MARKS = re.compile("[\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed]+")
_FOLDED = str.maketrans(
    {**dict.fromkeys("أإآٱ", "ا"), **dict.fromkeys("ىی", "ي"), **dict.fromkeys("ةەہ", "ه"), "ک": "ك", "’": "'"}
)

_LATIN_LETTER = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_ARABIC_LETTER = re.compile("[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\u08a0-\u08c9]")
_LATIN_WORD = re.compile("[A-Za-z0-9\u00c0-\u024f\u1e00-\u1eff]+(?:'[A-Za-z0-9\u00c0-\u024f]+)*")
_ARABIC_WORD = re.compile("[\u0620-\u065f\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\u08a0-\u08c9]+")

_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S{1,64}@\S+")
_QUOTED = re.compile(
    '"[^"\n]{1,400}"|“[^”\n]{1,400}”|«[^»\n]{1,400}»|„[^“”\n]{1,400}[“”]|`[^`\n]{1,400}`'
    "|(?<!\\w)['‘][^'’\n]{1,400}['’](?!\\w)"
)
_SENTENCE = re.compile(r"[^.!?؟:;؛\n]+(?:[.!?؟:;؛\n]+|$)")
_QUESTION_MARK = re.compile(r"[?؟]\W*$")
_POLITE_START = (
    r"\W*(?:(?:please|pls|hi|hello|doctor|dr|can|could|would|will|you|kindly|من فضلك|لو سمحت|ممكن|رجاء|الرجاء|دكتور|يا"
    r"|هل يمكنك|ارجو)(?!\w)\W*)*"
)
# To "explain" or "summarise" what follows: whatever language that is in, the instruction's own language asks.
_INSTRUCTS = re.compile(
    _POLITE_START
    + r"(?:explain|summari[sz]e|interpret|simplify|rewrite|choose|select|read|review|check|help me understand"
    r"|[ات]?(?:شرح|لخص|فسر|وضح)\w{0,4}|بسط\w{0,3}|اختر|اختار|اقرا\w{0,3}|راجع|ساعدني)(?!\w)"
)
_ASKS = re.compile(
    _POLITE_START
    + r"(?:(?:what|which|who|whose|when|where|why|how|is|are|am|do|does|did|can|could|should|would|will|have|has|may"
    r"|tell|describe|give|list|suggest|recommend|advise)\b"
    r"|(?:هل|ما|ماذا|ماهو|ماهي|متي|اين|وين|فين|كيف|كم|لماذا|ليش|ليه|شو|ايش|وش|شنو|اش|علاش|واش|كيفاش|شلون|ازاي|اي|قل"
    r"|قولي|اخبرني|خبرني|اذكر|انصحني)(?!\w))"
)

# Digits that stand for Arabic letters: at the start (3andi, 7asasiya), inside (ta3ban) or, weaker, at the end (soda3).
_DIGIT_LETTER = re.compile(r"[235679]'?[a-z][a-z']+|[a-z']+[235679]'?[a-z]+(?:[235679]'?[a-z]*)*")
_FINAL_DIGIT_LETTER = re.compile(r"[a-z]{2,}[237]")
# Quantities, ordinals, drugs and strains with one digit in front or inside.
_NOT_ARABIZI = re.compile(
    r"\d(?:mg|mcg|ug|ml|dl|kg|gm?|iu|mm|cm|km|am|pm|rd|nd|th|st|x|ho?u?rs?|d|days?|wks?|weeks?|mo|mos|months?|yo|yrs?"
    r"|years?|min|mins|minutes?|sec|times|tabs?|tablets?|pills?|caps|doses?|puffs?|drops?|units?|ppm|fu|mp|asa|htp|ht|ft"
    r"|lbs?|oz|lit(?:er|re)s?|kids?|children|wbc|rbc|ct|mri|in|of|and|or|to|per)"
    r"|[a-z]\d[a-z]\d?|(?:co|spo|pco|po|pao|sao|h|o)2[a-z]*|sars?\w*|covid\w*|p2y\w*|b2b|web\w*"
)
_PERSIAN_LETTER = re.compile("[پچژگکی]")
# Letters of Urdu, Kurdish, Pashto and Uyghur. Arabic dialects borrow none of them.
_FOREIGN_LETTER = re.compile("[ٹڈڑںہےێۆڕڵېۍښټډځڼړ]|ە(?=[\u0620-\u06d3])")
_UNARABIC_LETTER = re.compile("[پچژگکیٹڈڑںہےێۆڕڵېۍښټډځڼړە]")  # any of both

_WHOLE_LETTERS = frozenset("AaIi")  # the letters that are words
_FRAME_WEIGHT, _WORD_WEIGHT = 2, 1


class _Analysis(NamedTuple):
    """What one message says about the language: what it asks for, and the language that it is in itself."""

    requested: Language | None
    own: Language | None


def resolve(messages: Sequence[Mapping[str, str]], requested: Literal["auto", "en", "ar"] = "auto") -> Language:
    """Return the language to answer the latest user message in.

    `messages` are chat messages with string `role` and `content`. Any Unicode is accepted, nothing raises, and the same
    messages always give the same answer; earlier messages are analysed only as far back as they are needed.
    """
    if requested != "auto":
        return requested
    for message in reversed(messages):
        if message["role"] == "user":
            analysis = _analyse(_bounded(message["content"]))
            spoken = analysis.requested or analysis.own
            if spoken:
                return spoken
    return _opening(messages) or "en"


def plain(text: str) -> str:
    """Return `text` in lower case, its Arabic bare of marks and spelling variants: for matching, never for display."""
    return text.lower() if text.isascii() else _MARKS.sub("", text).translate(_FOLDED).lower()


def is_arabic(text: str) -> bool:
    """Whether the Arabic-script words of `text` are Arabic, not Persian, Urdu or another language of that script."""
    return _arabic_script_language(text) == "ar"


def is_foreign_latin(text: str) -> bool:
    """Whether the Latin-script words of `text` are a sentence of another language than English: French, Turkish ..."""
    spelled = _LATIN_WORD.findall(text.replace("’", "'"))
    if words.FOREIGN_FRAME.isdisjoint(map(str.lower, spelled)):
        return False
    telling = _telling(spelled)
    foreign = sum(word in words.FOREIGN_FRAME for word in telling)
    english = sum(word in words.ENGLISH_FRAME or word in words.ENGLISH_GLUE for word in telling)
    return foreign >= max(2, english + 1) and detect(text) != "en"


def _opening(messages: Sequence[Mapping[str, str]]) -> Language | None:
    """The language that was opened in, while no user has spoken one: the operator's wish, or the first reply's."""
    for message in messages:
        if message["role"] == "system":
            spoken = _analyse(_bounded(message["content"])).requested
        elif message["role"] == "assistant":
            # The first reply counts, not the latest: a reply that drifted must not pull the conversation along.
            spoken = _analyse(_bounded(message["content"])).own
        else:
            spoken = None
        if spoken:
            return spoken
    return None


def _bounded(text: str) -> str:
    return _ends(clean(text).text, _REQUEST_ENDS)


def _ends(text: str, length: int) -> str:
    return text if len(text) <= 2 * length else f"{text[:length]}\n{text[-length:]}"


@lru_cache(maxsize=2048)
def _analyse(text: str) -> _Analysis:
    return _Analysis(requested_language(plain(text)), _own_language(_ends(text, _OWN_ENDS)))


def _own_language(text: str) -> Language | None:
    if "/" in text or "@" in text or "www." in text:
        text = _ADDRESS.sub(" ", text)
    latin = _LATIN_LETTER.search(text)
    arabic = None if text.isascii() else _ARABIC_LETTER.search(text)
    if latin and arabic:
        return _mixed_language(text)
    if arabic:
        return _arabic_script_language(text)
    return _latin_script_language(text) if latin else None


def _mixed_language(text: str) -> Language | None:
    unquoted = _QUOTED.sub(" ", text)
    if unquoted != text:
        # Without its quotations the text may be in one script only, or empty.
        return _own_language(unquoted) or _majority(text)
    asking = _asking_sentence(text)
    if asking and (spoken := _majority(asking)):
        return spoken
    return _majority(text)


def _asking_sentence(text: str) -> str | None:
    """The sentence that carries the request: the first instruction about what follows it, else the last question."""
    asking = None
    for sentence in _SENTENCE.findall(text):
        folded = plain(sentence)
        if _INSTRUCTS.match(folded):
            return str(sentence)
        if _QUESTION_MARK.search(sentence) or _ASKS.match(folded):
            asking = str(sentence)
    return asking


def _majority(text: str) -> Language | None:
    """The language of most ordinary words; words that build sentences count double, Latin terms not at all."""
    arabic, english = _arabic_weight(text), _english_weight(text)
    if arabic == english:
        return None if not arabic else _first_frame(text)
    return "ar" if arabic > english else "en"


def _first_frame(text: str) -> Language:
    for word in re.findall(r"[\w']+", plain(text)):
        if word in words.ENGLISH_FRAME:
            return "en"
        if word in words.ARABIC_FRAME:
            return "ar"
    return "ar"


def _arabic_weight(text: str) -> int:
    if _arabic_script_language(text) is None:
        return 0
    spelled = _ARABIC_WORD.findall(plain(text))
    # A single letter is an option's label, except the conjunction.
    counted = [word for word in spelled if len(word) > 1 or word == "و"]
    return sum(_FRAME_WEIGHT if word in words.ARABIC_FRAME else _WORD_WEIGHT for word in counted)


def _english_weight(text: str) -> int:
    spelled = _LATIN_WORD.findall(text.lower().replace("’", "'"))
    frame = sum(word in words.ENGLISH_FRAME for word in spelled)
    others = sum(word in words.ENGLISH_GLUE or word in words.ENGLISH_COMMON for word in spelled)
    # Without a word that builds sentences this is a term of several words ("chest pain and shortness of breath").
    return _FRAME_WEIGHT * frame + _WORD_WEIGHT * others if frame else others // 2


def _latin_script_language(text: str) -> Language | None:
    """English, Arabic in Latin letters, or None for a term, an acknowledgement or any other language."""
    spelled = [word for word in _LATIN_WORD.findall(text.replace("’", "'")) if not word.isdigit()]
    telling = _telling(spelled)
    frame = sum(word in words.ENGLISH_FRAME for word in telling)
    if _arabizi_score({word.lower() for word in spelled}) > max(1, 2 * frame):
        return "ar"
    if all(word in words.ACKNOWLEDGEMENTS for word in telling):
        return None
    return "en" if _is_english(text, telling, frame) else None


def _telling(spelled: list[str]) -> list[str]:
    """The words that say something about the language, in lower case: no abbreviations, codes or single letters."""
    shouted = sum(map(str.isupper, spelled)) * 2 > len(spelled) and _builds_sentences(spelled)
    return [
        word.lower()
        for word in spelled
        if word in _WHOLE_LETTERS
        or (len(word) > 1 and (shouted or not word.isupper()) and word.replace("'", "").isalpha())
    ]


def _builds_sentences(spelled: list[str]) -> bool:
    return sum(word.lower() in words.ENGLISH_FRAME or word.lower() in words.ENGLISH_GLUE for word in spelled) > 1


def _is_english(text: str, telling: list[str], frame: int) -> bool:
    foreign = sum(word in words.FOREIGN_FRAME for word in telling)
    if foreign > frame:
        return False
    total = len(telling)
    known = frame + sum(word in words.ENGLISH_GLUE or word in words.ENGLISH_COMMON for word in telling)
    if frame and known * 5 >= total * 2:
        return True
    if telling[0] in words.ENGLISH_OPENERS and total > 1 and not foreign:
        return True
    # A few nouns in a row are a term. From here on these are sentences without the words that build most sentences.
    if not (frame and total > 3) and total < 6:
        return False
    return known * 2 >= total or (known > 0 and detect(text) == "en")


def _arabizi_score(lowered: set[str]) -> int:
    score = final = 0
    for word in lowered:
        if word in words.ARABIZI:
            score += 1
        elif word.isalpha() or _NOT_ARABIZI.fullmatch(word):
            continue
        elif _DIGIT_LETTER.fullmatch(word):
            score += 2
        elif _FINAL_DIGIT_LETTER.fullmatch(word):
            final += 1
    return score + final if score else 0


def _arabic_script_language(text: str) -> Language | None:
    """Arabic, or None for Persian, Urdu ...: letters and common words decide, and langdetect where they do not."""
    bare = _MARKS.sub("", text)
    spelled = _ARABIC_WORD.findall(bare)
    if not _UNARABIC_LETTER.search(bare) and words.PERSIAN_OR_URDU.isdisjoint(spelled):
        return "ar"
    foreign = sum(word in words.PERSIAN_OR_URDU for word in spelled)
    strong = len(_FOREIGN_LETTER.findall(bare))
    if not (foreign or strong or _PERSIAN_LETTER.search(bare)):
        return "ar"
    native = sum(
        word in words.ARABIC_FRAME or (word.endswith("ه") and "ة" in bare) for word in _ARABIC_WORD.findall(plain(bare))
    )
    if foreign + strong != native:
        return "ar" if native > foreign + strong else None
    if len(spelled) < 3:
        return None if foreign or strong else "ar"
    return "ar" if detect(bare) == "ar" else None
