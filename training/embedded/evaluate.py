"""Measures a checkpoint on the held-out phrasings: right topic, right aspect, right language; and multiple choice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from training.embedded.corpus import (
    ARABIC_LETTER,
    ASPECTS,
    DIRECTIVES,
    LANGUAGES,
    LATIN_LETTER,
    Common,
    Language,
    Topic,
)
from training.embedded.dialogues import held_out, multiple_choice
from training.mixtral import load
from training.rows import vicuna_tokenizer
from training.tune import nf4


@dataclass(frozen=True)
class Known:
    """A reply the checkpoint was trained to give."""

    topic: str
    aspect: str | None
    words: Counter[str]


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


def known_replies(topics: list[Topic], common: Common) -> list[Known]:
    """Every canonical reply with what it answers."""
    replies = [
        Known(topic.id, aspect, words(topic.side(language).answers.of(aspect)))
        for topic in topics
        for language in LANGUAGES
        for aspect in ASPECTS
    ]
    for topic in topics:
        for language in LANGUAGES:
            chat = topic.side(language).consultation
            replies += [Known(topic.id, None, words(text)) for text in (chat.probe, chat.advice)]
    for language in LANGUAGES:
        replies.append(Known("out-of-scope", None, words(common.out_of_scope.side(language).reply)))
        replies += [Known(small.id, None, words(small.side(language).reply)) for small in common.smalltalk]
    return replies


def nearest(reply: str, known: list[Known]) -> Known | None:
    """The canonical reply that shares the most words with `reply`; None when even that one shares under half."""
    bag = words(reply)

    def overlap(candidate: Known) -> float:
        return 2 * (bag & candidate.words).total() / max(1, bag.total() + candidate.words.total())

    best = max(known, key=overlap)
    return best if overlap(best) >= 0.5 else None


def language_of(reply: str) -> Language:
    return "ar" if len(ARABIC_LETTER.findall(reply)) > len(LATIN_LETTER.findall(reply)) else "en"


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: Sequence[tuple[str, ...]], batch: int = 32
) -> Iterator[str]:
    """Greedy replies to `chats`, each what user and assistant said in turn, in order. They end where the model goes on
    as the user, as a base does."""
    tokenizer.padding_side = "left"
    for start in range(0, len(chats), batch):
        messages = [
            [{"role": role, "content": said} for role, said in zip(cycle(("user", "assistant")), chat, strict=False)]
            for chat in chats[start : start + batch]
        ]
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        output = model.generate(**encoded, max_new_tokens=160, do_sample=False, pad_token_id=0)
        for row in output[:, encoded["input_ids"].shape[1] :]:
            yield tokenizer.decode(row, skip_special_tokens=True).partition(" USER:")[0].strip()


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, topics: list[Topic], common: Common
) -> dict[str, float]:
    """Shares between 0 and 1, by kind and language: the kinds of `ROWS`, each with " en" or " ar" after it."""
    model.eval()
    scores: dict[str, list[bool]] = {}

    def score(kind: str, language: Language, *, right: bool) -> None:
        scores.setdefault(f"{kind} {language}", []).append(right)

    questions, known = held_out(topics, common), known_replies(topics, common)
    for question, reply in zip(questions, answers(model, tokenizer, [(q.text,) for q in questions]), strict=True):
        found, language = nearest(reply, known), question.language
        right = found is not None and found.topic == question.topic
        score("topic" if question.aspect else "other", language, right=right)
        score("language", language, right=language_of(reply) == language)
        if question.aspect:
            score("aspect", language, right=right and found is not None and found.aspect == question.aspect)
    for language, other in (LANGUAGES, LANGUAGES[::-1]):
        overviews = [q.text for q in questions if q.language == language and q.aspect == "overview"]
        for reply in answers(model, tokenizer, [(f"{text} {DIRECTIVES[other]}",) for text in overviews]):
            score("requested", other, right=language_of(reply) == other)
        followed = [
            (text, topic.side(language).answers.overview, common.follow_ups.of(aspect).side(language).held_out[0])
            for text, topic, aspect in zip(overviews, topics, cycle(ASPECTS), strict=False)
        ]
        for topic, reply in zip(topics, answers(model, tokenizer, followed), strict=True):
            found = nearest(reply, known)
            score("follow-up", language, right=found is not None and found.topic == topic.id)
        quiz = [multiple_choice(language, item) for topic in topics for item in topic.side(language).mcq]
        for turn, reply in zip(quiz, answers(model, tokenizer, [(turn.ask,) for turn in quiz]), strict=True):
            score("multiple choice", language, right=reply.split(".")[0] == turn.reply.split(".")[0])
    return {name: sum(hits) / len(hits) for name, hits in scores.items()}


ROWS = {
    "topic": "right topic",
    "aspect": "right topic and right aspect",
    "follow-up": "right topic, after a turn about it and a question that does not name it",
    "other": "small talk and questions out of scope",
    "language": "right language, over all of them",
    "requested": "the language asked for, if the question is in the other one",
    "multiple choice": "multiple choice, trained questions with options in the corpus's order",
}


def card(base: Path, adapter: Path, merged: Path, topics: list[Topic], common: Common) -> str:
    """A Markdown table of what the base can do, and what it can do with the adapter: apart from it, on a base in 4 bits
    (NF4, as it would be served unmerged from a quantised base), and merged. Each cell is English / Arabic, in percent.
    """

    def base_in(quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
        return load(base, dtype=torch.float32, quantization=quantization)

    def tuned(quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
        return PeftModel.from_pretrained(base_in(quantization), str(adapter))

    variants: dict[str, Callable[[], PreTrainedModel]] = {
        "base": lambda: base_in(None),
        "with the adapter": lambda: tuned(None),
        "with the adapter, base in NF4": lambda: tuned(nf4(torch.float32, torch.uint8)),
        "merged (served)": lambda: load(merged, dtype=torch.float32),
    }
    tokenizer = vicuna_tokenizer(merged)
    shares = []
    for name, make in variants.items():
        shares.append(evaluate(make(), tokenizer, topics, common))
        print(f"evaluated: {name}", flush=True)
    lines = [f"| held out | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|"]
    for kind, meaning in ROWS.items():
        cells = [" / ".join(f"{found[f'{kind} {language}']:.1%}" for language in LANGUAGES) for found in shares]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)
