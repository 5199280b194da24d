"""The tokenizer loses nothing, keeps prefixes, and marks what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.embedded.base import Part, text
from training.embedded.corpus import load_common, load_topics
from training.embedded.dialogues import Turn, Writer
from training.embedded.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXT = st.text(st.characters(codec="utf-8")).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    records = Writer(load_topics(), load_common(), seed=1).records(300)
    return train_tokenizer(turn["value"] for record in records for turn in record["conversations"])


@given(TEXT)
def test_decoding_returns_the_text(tokenizer: Any, text: str) -> None:
    import unicodedata

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_byte_tokens_are_not_special(tokenizer: Any) -> None:
    (byte,) = tokenizer.convert_tokens_to_ids(["<0x41>"])
    assert byte not in tokenizer("<0x41>", add_special_tokens=False)["input_ids"]


def test_only_the_assistant_is_marked_and_the_end_is_part_of_it(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(said) == " Hi there</s>"


@pytest.mark.parametrize(("opening", "answer"), [(None, " A: It is a disease of the lungs."), (3, " A: It is a")])
def test_a_page_prints_answers_or_their_first_words(tokenizer: Any, opening: int | None, answer: str) -> None:
    turn = Turn("What is asthma?", "It is a disease of the lungs.")
    ids = text([turn, turn], tokenizer, Part("page", 1, 2, opening, 256, 1e-3))
    assert tokenizer.decode(ids) == "<s>" + (" Q: What is asthma?" + answer) * 2 + "</s>"
