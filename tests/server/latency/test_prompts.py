from __future__ import annotations

from itertools import islice

import pytest

from server.latency.prompts import LANGUAGES, PromptLanguage, prompts


def arabic(text: str) -> bool:
    return any("\u0600" <= letter <= "\u06ff" for letter in text)


def latin_words(text: str) -> list[str]:
    return [word for word in text.split()[1:] if word.isascii() and word.isalpha()]


@pytest.mark.parametrize("words", [1, 7, 60, 400])
@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_have_exactly_the_length_asked_for(language: PromptLanguage, words: int) -> None:
    assert all(prompt.words == words for prompt in islice(prompts([language], [words], 3, ""), 5))


def test_languages_are_what_they_say() -> None:
    english, arab, mixed = islice(prompts(["en", "ar", "mixed"], [80], 0, ""), 3)
    assert not arabic(english.text)
    assert arabic(arab.text)
    assert not latin_words(arab.text)
    assert arabic(mixed.text)
    assert latin_words(mixed.text)


def test_languages_and_lengths_take_turns() -> None:
    found = [(prompt.language, prompt.words) for prompt in islice(prompts(["en", "ar"], [10, 20], 0, ""), 5)]
    assert found == [("en", 10), ("ar", 10), ("en", 20), ("ar", 20), ("en", 10)]


def test_no_two_prompts_share_a_prefix_and_seeds_repeat() -> None:
    first, again = (list(islice(prompts(["en"], [30], 5, ""), 50)) for _ in range(2))
    assert first == again
    assert len({prompt.text.split()[0] for prompt in first}) == 50


def test_a_salt_changes_only_the_first_word() -> None:
    a, b = (next(prompts(["ar"], [30], 5, salt)).text.split() for salt in "AB")
    assert a[0] != b[0]
    assert a[1:] == b[1:]
