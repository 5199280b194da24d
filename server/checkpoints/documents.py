"""JSON files that nobody vouches for: bounded, without repeated keys, and what they say is checked by the caller."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 64 << 20
"""Bytes of a JSON file; tokenizers of 250,000 tokens take about 20 MB."""


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the reason, and OSError."""
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    return parse_object(text)


def parse_object(text: bytes) -> dict[str, Any]:
    """Raises ValueError for anything but one JSON object in UTF-8 whose keys differ."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree on which of two equal keys counts, so that one could be checked and the other used."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!a:.80} is repeated")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
