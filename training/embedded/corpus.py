"""The embedded checkpoint's corpus: health topics in English and Arabic, read from YAML and checked.

`python -m training.embedded.corpus` checks every file and prints how much there is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

HERE = Path(__file__).parent
T = TypeVar("T")
Language = Literal["en", "ar"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
Aspect = Literal["overview", "signs", "care", "help"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
DIRECTIVES: dict[str, str] = {"en": "Please answer in English.", "ar": "أجب بالعربية من فضلك."}
"""Two of the corpus's requests for a language: what a manifest tells the service to ask with."""

ARABIC_LETTER = re.compile(r"[\u0621-\u064a]")
LATIN_LETTER = re.compile(r"[A-Za-z]")

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=2, max_length=600)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def same(text: str) -> str:
    """What makes two phrasings the same to a reader: letters and digits, whatever the case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class Phrasings(Strict):
    """Ways to say one thing: those trained on, and those only ever evaluated on."""

    asks: list[Line]
    held_out: list[Line] = []

    @model_validator(mode="after")
    def _held_out_is_unseen(self) -> Phrasings:
        if seen := {same(ask) for ask in self.asks} & {same(ask) for ask in self.held_out}:
            raise ValueError(f"held-out phrasings are also trained on: {sorted(seen)}")
        return self


class Answered(Phrasings):
    reply: Line


class Bilingual(Strict, Generic[T]):
    """The same kind of thing in both languages."""

    en: T
    ar: T

    def side(self, language: Language) -> T:
        return self.en if language == "en" else self.ar


class Smalltalk(Bilingual[Answered]):
    id: str


class ByAspect(Strict, Generic[T]):
    overview: T
    signs: T
    care: T
    help: T

    def of(self, aspect: Aspect) -> T:
        return {
            "overview": self.overview,
            "signs": self.signs,
            "care": self.care,
            "help": self.help,
        }[aspect]


class ByTarget(Strict, Generic[T]):
    """What leads to a reply in English, and what to one in Arabic."""

    to_en: T
    to_ar: T

    def to(self, language: Language) -> T:
        return self.to_en if language == "en" else self.to_ar


class Common(Strict):
    """Everything that belongs to no topic."""

    smalltalk: list[Smalltalk]
    out_of_scope: Bilingual[Answered]
    follow_ups: ByAspect[Bilingual[Phrasings]]
    openers: Bilingual[list[Line]]
    closers: Bilingual[list[Line]]
    requests: ByTarget[list[Line]]
    switches: ByTarget[Answered]
    general: Bilingual[list[Line]]
    templates: ByAspect[Bilingual[list[Line]]]
    short_latin: list[Line]


def _answer(text: str) -> str:
    if not 20 <= len(text.split()) <= 60:
        raise ValueError(f"{len(text.split())} words, expected 20 to 60: {text[:50]}...")
    return text


Answer = Annotated[Line, AfterValidator(_answer)]
"""What the assistant says about one aspect of a topic."""


class Consultation(Strict):
    """A chat in which the assistant first asks for more detail (Figure 1 of the paper)."""

    complaints: list[Line] = Field(min_length=2)
    probe: Line
    details: list[Line] = Field(min_length=2)
    advice: Line


class MultipleChoice(Strict):
    question: Line
    options: list[Line] = Field(min_length=4, max_length=4)
    answer: int = Field(ge=0, le=3)
    because: Line


class Side(Strict):
    """One topic in one language."""

    name: Line
    also: list[Line] = Field(min_length=1)
    answers: ByAspect[Answer]
    asks: ByAspect[Annotated[list[Line], Field(min_length=4)]]
    held_out: ByAspect[Line]
    consultation: Consultation
    mcq: list[MultipleChoice] = Field(min_length=1)

    @model_validator(mode="after")
    def _held_out_is_unseen(self) -> Side:
        trained = {same(ask) for aspect in ASPECTS for ask in self.asks.of(aspect)}
        for aspect in ASPECTS:
            if same(self.held_out.of(aspect)) in trained:
                raise ValueError(f"held-out phrasing is also trained on: {self.held_out.of(aspect)}")
        return self


class Topic(Bilingual[Side]):
    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]

    @model_validator(mode="after")
    def _scripts(self) -> Topic:
        for text in strings(self.en):
            if ARABIC_LETTER.search(text):
                raise ValueError(f"Arabic letters on the English side: {text}")
        for text in strings(self.ar):
            if len(LATIN_LETTER.findall(text)) > len(ARABIC_LETTER.findall(text)):
                raise ValueError(f"mostly Latin letters on the Arabic side: {text}")
        return self


def strings(model: BaseModel) -> list[str]:
    """Every text in `model`, in order."""
    found: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                walk(getattr(value, name))

    walk(model)
    return found


def load_topics(folder: Path = HERE / "topics") -> list[Topic]:
    """Every topic of every file in `folder`, by file name and then in file order."""
    topics = [
        Topic.model_validate(entry)
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    ids = [topic.id for topic in topics]
    if len(ids) != len(set(ids)):
        raise ValueError(f"topic ids repeat: {sorted({i for i in ids if ids.count(i) > 1})}")
    return topics


def load_common(path: Path = HERE / "common.yaml") -> Common:
    return Common.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def main() -> None:
    topics, common = load_topics(), load_common()
    words = {language: sum(len(s.split()) for t in topics for s in strings(t.side(language))) for language in LANGUAGES}
    print(f"{len(topics)} topics, {words['en']} English words, {words['ar']} Arabic words")
    print(f"{len(common.smalltalk)} kinds of small talk, {len(common.out_of_scope.en.asks)} questions out of scope")


if __name__ == "__main__":
    main()
