"""The directive: where it stands, when it is there, and that history renders the same next time."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.language.guide import NO_DIRECTIVES, UNKNOWN_CHECKPOINT, Directives, directed, guide

MISMATCH = Directives({"en": "(English!)", "ar": "(بالعربية!)"}, "mismatch")
ENGLISH, ARABIC = "What are the symptoms of asthma?", "ما أعراض الربو عند الأطفال؟"
REPLY = "It is a common condition."


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


@pytest.mark.parametrize(
    ("text", "requested", "language", "content"),
    [
        (ENGLISH, "auto", "en", f"{ENGLISH} (Answer in English.)"),
        (ARABIC, "auto", "ar", f"{ARABIC} (أجب باللغة العربية.)"),
        (ENGLISH, "ar", "ar", f"{ENGLISH} (أجب باللغة العربية.)"),
        (ARABIC, "en", "en", f"{ARABIC} (Answer in English.)"),
    ],
)
def test_the_directive_ends_the_users_turn(
    text: str, requested: Literal["auto", "en", "ar"], language: str, content: str
) -> None:
    guided, chosen = guide(turns(text), requested, UNKNOWN_CHECKPOINT)
    assert (chosen, contents(guided)) == (language, [content])


def test_a_checkpoint_without_directives_gets_none() -> None:
    guided, language = guide(turns(ENGLISH), "ar", NO_DIRECTIVES)
    assert (language, guided) == ("ar", turns(ENGLISH))


def test_use_mismatch_spares_turns_that_are_in_the_language_already() -> None:
    assert directed(ENGLISH, "en", MISMATCH) == ENGLISH
    assert directed(ENGLISH, "ar", MISMATCH) == f"{ENGLISH} (بالعربية!)"
    assert directed("Metformin", "ar", MISMATCH) == "Metformin (بالعربية!)"


def test_system_and_assistant_messages_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *turns(ENGLISH, REPLY, ARABIC)]
    guided, _ = guide(messages, "auto", UNKNOWN_CHECKPOINT)
    assert contents(guided)[::2] == ["Be brief.", REPLY]


def test_the_input_is_left_alone() -> None:
    messages = turns(ENGLISH)
    guide(messages, "auto", UNKNOWN_CHECKPOINT)
    assert messages == turns(ENGLISH)


TEXTS = st.lists(
    st.sampled_from([ENGLISH, ARABIC, "ok", "Metformin", "Answer in Arabic please", "5", "شكرا"]),
    min_size=1,
    max_size=6,
)


@given(said=TEXTS, directives=st.sampled_from([UNKNOWN_CHECKPOINT, MISMATCH, NO_DIRECTIVES]))
def test_history_renders_next_time_as_it_did_when_it_was_new(said: list[str], directives: Directives) -> None:
    before: list[dict[str, str]] = []
    for number in range(len(said)):
        texts = [text for user in said[: number + 1] for text in (user, REPLY)][:-1]
        guided, _ = guide(turns(*texts), "auto", directives)
        assert guided[: len(before)] == before
        before = guided
