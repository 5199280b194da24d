"""The tokenizer loses nothing, keeps prefixes, and marks what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.embedded.build import cut_replies
from training.embedded.corpus import load_common, load_topics
from training.embedded.dialogues import Writer
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


def test_cut_replies_keeps_prompts_whole() -> None:
    ids, spoken = [10, 11, 1, 2, 3, 12, 4, 5, 6], [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert cut_replies(ids, spoken, 2) == ([10, 11, 1, 2, 12, 4, 5], [0, 0, 1, 1, 0, 1, 1])
