"""Prompts of a set length in English, Arabic or both, different for every request so that no cache can answer them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from server.latency.fertility import sentences

PromptLanguage = Literal["en", "ar", "mixed"]
LANGUAGES: tuple[PromptLanguage, ...] = get_args(PromptLanguage)


@dataclass(frozen=True)
class Prompt:
    """One user turn. `words` is its whitespace-separated length."""

    language: PromptLanguage
    text: str

    @property
    def words(self) -> int:
        return len(self.text.split())


def make_prompt(language: PromptLanguage, words: int, case: str, rng: random.Random) -> Prompt:
    """Bundled sentences in random order, cut to exactly `words` words with `case` as the first.

    `mixed` draws every sentence from either language, as patients who switch between both do.
    """
    texts = {"en": sentences("en"), "ar": sentences("ar")}
    pools = ["en", "ar"] if language == "mixed" else [language]
    found = [case]
    while len(found) < words:
        found += rng.choice(texts[rng.choice(pools)]).split()
    return Prompt(language, " ".join(found[:words]))


def prompts(languages: list[PromptLanguage], lengths: list[int], seed: int, salt: str) -> Iterator[Prompt]:
    """Endless prompts over every pair of language and length in turn; the same for the same seed and salt.

    The salt changes only each prompt's first word: two endpoints can get the same text without sharing a cached prefix.
    """
    rng, cases = random.Random(seed), random.Random(f"{seed} {salt}")
    while True:
        for words in lengths:
            for language in languages:
                yield make_prompt(language, words, f"{cases.getrandbits(40):010x}:", rng)
