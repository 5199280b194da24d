"""Vicuna records from the corpus: conversations to train on, and held-out questions to evaluate on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from training.embedded.corpus import (
    ASPECTS,
    LANGUAGES,
    Aspect,
    Common,
    Language,
    MultipleChoice,
    Topic,
    same,
)

Record = dict[str, list[dict[str, str]]]

LENGTHS = (1, 1, 2, 3, 4, 5, 6, 8)
"""How many exchanges a conversation has; the first is the likeliest for standing twice."""
OPTION_LETTERS = {"en": "ABCD", "ar": "أبجد"}
EASTERN_VARIANTS = str.maketrans({"أ": "ا", "إ": "ا", "آ": "ا", "ة": "ه", "ى": "ي"})
DIACRITICS = re.compile("[\u064b-\u0652]")


class Turn(NamedTuple):
    ask: str
    reply: str


@dataclass(frozen=True)
class Question:
    """One held-out question: what it asks about, and in which language."""

    text: str
    language: Language
    topic: str
    aspect: Aspect | None


def multiple_choice(language: Language, item: MultipleChoice) -> Turn:
    """A question with options and its answer, written as in the paper's Figure 2."""
    letters = OPTION_LETTERS[language]
    options = " ".join(f"{letter}. {option}" for letter, option in zip(letters, item.options, strict=True))
    answer = f"{letters[item.answer]}. {item.options[item.answer]}"
    if language == "en":
        return Turn(f"Question: {item.question} Options: {options}", f"The correct answer is {answer}. {item.because}")
    return Turn(f"السؤال: {item.question} الخيارات: {options}", f"الإجابة الصحيحة هي {answer}. {item.because}")


def record(turns: list[Turn]) -> Record:
    """Turns to a Vicuna record."""
    return {
        "conversations": [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in (("human", turn.ask), ("gpt", turn.reply))
        ]
    }


class Writer:
    """Writes endless varied conversations over the corpus, the same ones for the same seed.

    `requests` is the share of questions about a topic that ask for a language, half of them for the other one.
    """

    def __init__(self, topics: list[Topic], common: Common, seed: int, requests: float = 0.12) -> None:
        self.requests = requests
        self.topics = topics
        self.common = common
        self.random = random.Random(seed)
        self.held_out = {same(question.text) for question in held_out(topics, common)}

    def records(self, count: int) -> Iterator[Record]:
        for _ in range(count):
            yield record(self.conversation())

    def page(self, questions: int) -> list[Turn]:
        """Questions about topics and their answers, as on a page of patient education: nobody is being talked to."""
        language = self.random.choice(LANGUAGES)
        topic: Topic | None = None
        turns: list[Turn] = []
        for _ in range(questions):
            if self.random.random() < 0.15:
                language = "ar" if language == "en" else "en"
            if topic is not None and self.random.random() < 0.3:
                turns.append(self.follow_up(topic, language))
            else:
                topic = self.random.choice(self.topics)
                aspect = self.random.choice(ASPECTS)
                turns.append(Turn(self.ask(topic, language, aspect), topic.side(language).answers.of(aspect)))
        return turns

    def transcript(self, exchanges: int) -> list[Turn]:
        """At least so many exchanges of a chat about health: questions as on a page, consultations, quiz questions,
        small talk and questions out of scope. Nobody asks for a language."""
        turns: list[Turn] = []
        while len(turns) < exchanges:
            language, topic = self.random.choice(LANGUAGES), self.random.choice(self.topics)
            kind = self.random.random()
            if kind < 0.12:
                turns += self.consultation(topic, language)
            elif kind < 0.22:
                turns.append(multiple_choice(language, self.shuffled(self.random.choice(topic.side(language).mcq))))
            elif kind < 0.30:
                turns.append(self.out_of_scope(language))
            elif kind < 0.40:
                turns.append(self.small_talk(language))
            else:
                turns += self.page(3)
        return turns

    def conversation(self) -> list[Turn]:
        """Some exchanges in which topics and languages change now and then."""
        language = self.random.choice(LANGUAGES)
        turns: list[Turn] = []
        topic: Topic | None = None
        for _ in range(self.random.choice(LENGTHS)):
            if self.random.random() < 0.25:
                language = "ar" if language == "en" else "en"
            kind = self.random.random()
            if topic is not None and kind < 0.22:
                turns.append(self.follow_up(topic, language))
            elif kind < 0.66:
                topic = self.random.choice(self.topics)
                turns.append(self.topical(topic, language, first=not turns))
            elif kind < 0.72:
                topic = self.random.choice(self.topics)
                item = self.random.choice(topic.side(language).mcq)
                turns.append(multiple_choice(language, self.shuffled(item)))
            elif kind < 0.79:
                topic = self.random.choice(self.topics)
                turns += self.consultation(topic, language)
            elif kind < 0.87:
                topic = None
                turns.append(self.out_of_scope(language))
            elif kind < 0.94 or not turns:
                turns.append(self.small_talk(language))
            elif kind < 0.97:
                acknowledged = next(s for s in self.common.smalltalk if s.id == "acknowledgement").side(language)
                ask = self.random.choice(self.common.short_latin)
                if self.random.random() < 0.3:
                    ask = f"{ask} {self.random.choice(self.common.requests.to(language))}"
                turns.append(Turn(ask, acknowledged.reply))
            else:
                language = "ar" if language == "en" else "en"
                switch = self.common.switches.to(language)
                turns.append(Turn(self.random.choice(switch.asks), switch.reply))
        return turns

    def topical(self, topic: Topic, language: Language, *, first: bool) -> Turn:
        aspect = self.random.choice(ASPECTS)
        ask = self.ask(topic, language, aspect)
        answered_in = language
        if self.random.random() < self.requests:
            answered_in = self.random.choice(LANGUAGES)
            request = self.random.choice(self.common.requests.to(answered_in))
            ask = f"{request} {ask}" if self.random.random() < 0.3 else f"{ask} {request}"
        elif self.random.random() < 0.2:
            ask = f"{self.random.choice(self.common.openers.side(language))} {ask}"
        elif self.random.random() < 0.1:
            ask = f"{ask} {self.random.choice(self.common.closers.side(language))}"
        return Turn(ask, topic.side(answered_in).answers.of(aspect))

    def ask(self, topic: Topic, language: Language, aspect: Aspect) -> str:
        side = topic.side(language)
        if self.random.random() < 0.6:
            return self.typed(self.random.choice(side.asks.of(aspect)), language)
        template = self.random.choice(self.common.templates.of(aspect).side(language))
        ask = template.format(name=self.random.choice([side.name, side.name, *side.also]))
        if same(ask) in self.held_out:
            return self.random.choice(side.asks.of(aspect))
        return self.typed(ask, language)

    def follow_up(self, topic: Topic, language: Language) -> Turn:
        aspect = self.random.choice(ASPECTS)
        ask = self.random.choice(self.common.follow_ups.of(aspect).side(language).asks)
        return Turn(self.typed(ask, language), topic.side(language).answers.of(aspect))

    def consultation(self, topic: Topic, language: Language) -> list[Turn]:
        chat = topic.side(language).consultation
        return [
            Turn(self.typed(self.random.choice(chat.complaints), language), chat.probe),
            Turn(self.typed(self.random.choice(chat.details), language), chat.advice),
        ]

    def out_of_scope(self, language: Language) -> Turn:
        scope = self.common.out_of_scope.side(language)
        return Turn(self.typed(self.random.choice(scope.asks), language), scope.reply)

    def small_talk(self, language: Language) -> Turn:
        small = self.random.choice(self.common.smalltalk).side(language)
        return Turn(self.typed(self.random.choice(small.asks), language), small.reply)

    def shuffled(self, item: MultipleChoice) -> MultipleChoice:
        """The same question with its options in another order, so that the letter cannot be learnt by heart."""
        order = self.random.sample(range(4), 4)
        return item.model_copy(update={"options": [item.options[i] for i in order], "answer": order.index(item.answer)})

    def typed(self, text: str, language: Language) -> str:
        """`text` as people type it: now and then without capitals, punctuation, hamzas or diacritics."""
        if self.random.random() < 0.2:
            text = text.rstrip(".?؟!")
        if language == "en":
            return text.lower() if self.random.random() < 0.15 else text
        if self.random.random() < 0.2:
            text = DIACRITICS.sub("", text).translate(EASTERN_VARIANTS)
        return text


def held_out(topics: list[Topic], common: Common) -> list[Question]:
    """Every question that is kept from training: topics by aspect, small talk, and questions out of scope."""
    questions = [
        Question(topic.side(language).held_out.of(aspect), language, topic.id, aspect)
        for topic in topics
        for language in LANGUAGES
        for aspect in ASPECTS
    ]
    for language in LANGUAGES:
        scope = common.out_of_scope.side(language)
        questions += [Question(ask, language, "out-of-scope", None) for ask in scope.held_out]
        questions += [
            Question(ask, language, small.id, None)
            for small in common.smalltalk
            for ask in small.side(language).held_out
        ]
    return questions
