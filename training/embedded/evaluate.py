"""Measures a checkpoint on the held-out phrasings: right topic, right aspect, right language; and multiple choice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.embedded.corpus import (
    ARABIC_LETTER,
    ASPECTS,
    LANGUAGES,
    LATIN_LETTER,
    Common,
    Language,
    Topic,
)
from training.embedded.dialogues import Question, held_out, multiple_choice


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
def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: list[list[dict[str, str]]], batch: int = 32
) -> Iterator[str]:
    """Greedy replies to `chats`, in order."""
    tokenizer.padding_side = "left"
    for start in range(0, len(chats), batch):
        encoded = tokenizer.apply_chat_template(
            chats[start : start + batch], tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        output = model.generate(**encoded, max_new_tokens=160, do_sample=False, pad_token_id=0)
        for row in output[:, encoded["input_ids"].shape[1] :]:
            yield tokenizer.decode(row, skip_special_tokens=True).strip()


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, topics: list[Topic], common: Common
) -> dict[str, Any]:
    """Shares between 0 and 1 over the held-out phrasings, by kind and language, and a list of the misses."""
    model.eval()
    questions = held_out(topics, common)
    known = known_replies(topics, common)
    scores: dict[str, list[bool]] = {}
    misses: list[tuple[Question, str]] = []
    chats = [[{"role": "user", "content": question.text}] for question in questions]
    for question, reply in zip(questions, replies(model, tokenizer, chats), strict=True):
        found = nearest(reply, known)
        right = found is not None and found.topic == question.topic
        kind = "topic" if question.aspect else "other"
        scores.setdefault(f"{kind} {question.language}", []).append(right)
        scores.setdefault(f"language {question.language}", []).append(language_of(reply) == question.language)
        if question.aspect:
            scores.setdefault(f"aspect {question.language}", []).append(
                right and found is not None and found.aspect == question.aspect
            )
        if not right:
            misses.append((question, reply))
    for language in LANGUAGES:
        asked = [multiple_choice(language, item) for topic in topics for item in topic.side(language).mcq]
        chats = [[{"role": "user", "content": turn.ask}] for turn in asked]
        answered = replies(model, tokenizer, chats)
        scores[f"multiple choice {language}"] = [
            reply.split(".")[0] == turn.reply.split(".")[0] for reply, turn in zip(answered, asked, strict=True)
        ]
    return {"shares": {name: sum(hits) / len(hits) for name, hits in scores.items()}, "misses": misses}


def table(result: dict[str, Any]) -> str:
    shares = result["shares"]
    rows = [f"{'held out':18}{'en':>8}{'ar':>8}"]
    for kind in ("topic", "aspect", "other", "language", "multiple choice"):
        rows.append(f"{kind:18}{shares[f'{kind} en']:8.1%}{shares[f'{kind} ar']:8.1%}")
    return "\n".join(rows)
