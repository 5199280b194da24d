"""Token fertility: how many tokens a tokenizer spends on a word, measured on bundled English-Arabic health text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from server.latency.shapes import Strict, read_yaml

Language = Literal["en", "ar"]


class Fertility(Strict):
    """Tokens per whitespace-separated word and characters per token, for one language."""

    tokens_per_word: float = Field(gt=0)
    characters_per_token: float = Field(gt=0)


# Mixtral's 32k SentencePiece vocabulary on data/parallel.yaml; a test recomputes both from the real tokenizer.
MIXTRAL: dict[Language, Fertility] = {
    "en": Fertility(tokens_per_word=1.271, characters_per_token=4.338),
    "ar": Fertility(tokens_per_word=5.038, characters_per_token=1.104),
}


@cache
def sentences(language: Language) -> list[str]:
    """The bundled sentences of one language, in the same order for both."""
    return [pair[language] for pair in read_yaml("parallel.yaml")["pairs"]]


def measure(count_tokens: Callable[[str], int]) -> dict[Language, Fertility]:
    """Fertility in both languages of a tokenizer given as a function from text to its number of tokens."""
    return {"en": _measure("en", count_tokens), "ar": _measure("ar", count_tokens)}


def _measure(language: Language, count_tokens: Callable[[str], int]) -> Fertility:
    texts = sentences(language)
    tokens = sum(count_tokens(text) for text in texts)
    return Fertility(
        tokens_per_word=tokens / sum(len(text.split()) for text in texts),
        characters_per_token=sum(len(text) for text in texts) / tokens,
    )


def tokenizer(directory: Path) -> Callable[[str], int]:
    """Count tokens, without special tokens, with the tokenizer.json or tokenizer.model* in `directory`.

    Raises ValueError when there is none.
    """
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda text: len(fast.encode(text, add_special_tokens=False).ids)
    pieces = sorted(directory.glob("tokenizer.model*"))
    if not pieces:
        raise ValueError(f"{directory} holds neither tokenizer.json nor tokenizer.model")
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(pieces[0]))
    return lambda text: len(processor.encode(text))
