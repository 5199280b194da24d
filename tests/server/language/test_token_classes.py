"""Token classes: scripts of characters, words of tokens, and characters that come as bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.language.token_classes import NOTHING, Piece, Script, Vocabulary, piece, read_vocabulary, script, utf8

SCRIPTS = {
    Script.LATIN: "aZéøşẞ",
    Script.ARABIC: "سپۀىﷲﺎًـٱ",
    Script.NEUTRAL: "5٥.,؟؛٪-—²½µαβ €≥→😀\t\u0301\u200d\u200f",
    Script.BREAK: "\n\r\u2028\u0085\f",
    Script.NEVER: "你のЖאकแ한。ａ５𝐇⠓\ufffd\ue000\x00\x1b",
}


@pytest.mark.parametrize(("expected", "char"), [(kind, char) for kind, text in SCRIPTS.items() for char in text])
def test_script_of_a_character(expected: Script, char: str) -> None:
    assert script(char) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Pan", Piece(Script.LATIN, letters=3, starts=1, tail=3, visible=True)),
        ("adol", Piece(Script.LATIN, letters=4, joins=True, tail=4, lower=True, visible=True)),
        ("x-ray ", Piece(Script.LATIN, letters=4, starts=1, joins=True, lower=True, visible=True)),
        ("(CT", Piece(Script.LATIN, letters=2, starts=1, tail=2, visible=True)),
        (" ال", Piece(Script.ARABIC, letters=2, starts=1, tail=2, lower=True, visible=True)),
        ("  ", Piece(Script.NEUTRAL)),
        (" 5", Piece(Script.NEUTRAL, visible=True)),
        (");\n", Piece(Script.BREAK, visible=True)),
        ("a\n", NOTHING),
        ("aس", NOTHING),
        ("a你", NOTHING),
        ("", NOTHING),
    ],
)
def test_words_of_a_token(text: str, expected: Piece) -> None:
    assert piece(text) == expected


def test_special_tokens_never_come_and_the_end_is_known(tokenizer: Any, vocabulary: Vocabulary) -> None:
    by_token = [vocabulary.pieces[symbol] for symbol in vocabulary.symbols]
    assert by_token[tokenizer.bos_token_id] == by_token[tokenizer.unk_token_id] == NOTHING
    assert by_token[tokenizer.eos_token_id] == Piece(Script.END)


def test_every_token_has_its_place(tokenizer: Any, vocabulary: Vocabulary) -> None:
    assert len(vocabulary.symbols) == len(tokenizer)
    for token in range(len(tokenizer)):
        text = tokenizer.convert_ids_to_tokens(token)
        if vocabulary.symbols[token] < 128:
            assert text == f"<0x{vocabulary.symbols[token] + 0x80:02X}>"
        elif not text.startswith("<"):
            assert vocabulary.pieces[vocabulary.symbols[token]] == piece(text.replace("▁", " "))


def test_ids_beyond_the_tokenizer_never_come(tokenizer: Any) -> None:
    padded = read_vocabulary(tokenizer, len(tokenizer) + 64, [])
    assert {padded.pieces[symbol] for symbol in padded.symbols[len(tokenizer) :]} == {NOTHING}


def test_other_vocabularies_are_refused() -> None:
    class Words(SimpleNamespace):
        def __len__(self) -> int:
            return 2

    words = Words(convert_ids_to_tokens=lambda ids: ["Ġhello", "world"], all_special_ids=[])
    with pytest.raises(ValueError, match="SentencePiece"):
        read_vocabulary(words, 2, [])


@given(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]))
def test_bytes_add_up_to_their_character(char: str) -> None:
    state = 0
    for byte in char.encode():
        expected = script(char)
        step = utf8().states[state][byte - 0x80]
        if step < 0:
            break
        assert expected in utf8().reach[step]
        state = step
    assert Script(~step) == expected


@given(st.binary(min_size=1, max_size=4).map(lambda bytes_: bytes(byte | 0x80 for byte in bytes_)))
def test_bytes_that_are_no_utf8_never_come(data: bytes) -> None:
    state = 0
    for index, byte in enumerate(data):
        step = utf8().states[state][byte - 0x80]
        if step < 0:
            complete = Script(~step) != Script.NEVER
            assert not complete or len(data[: index + 1].decode()) == 1
            return
        state = step
