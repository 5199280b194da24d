"""`--adapter NAME=DIR`: adapters that vLLM applies while it runs, beside the base, where it can."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = "adapter_config.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Unmerged:
    """An adapter. `name` is what requests call it; `revision` is its name and content in one.

    vLLM tells prefix caches apart by the adapter's name alone. Under `revision` no two contents share one.
    """

    name: str
    directory: Path
    rank: int
    revision: str


def read_unmerged(entries: Sequence[str]) -> tuple[Unmerged, ...]:
    """`NAME=DIR` entries. Raises ValueError for one that is no adapter, and for a name that repeats."""
    found = tuple(map(_read, entries))
    if len({adapter.name for adapter in found}) != len(found):
        raise ValueError("--adapter: names repeat")
    return found


def _read(entry: str) -> Unmerged:
    name, equals, path = entry.partition("=")
    directory = Path(path)
    if not (equals and NAME.fullmatch(name)):
        raise ValueError("--adapter reads NAME=DIR")
    weights = directory / "adapter_model.safetensors"
    try:
        rank = int(json.loads((directory / CONFIG).read_text(encoding="utf-8"))["r"])
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--adapter: {directory} is not a LoRA adapter in safetensors: {error}") from None
    return Unmerged(name, directory, rank, f"{name}@{digest[:12]}")
