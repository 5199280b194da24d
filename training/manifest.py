"""Writes `bimedix.json`, which says what a checkpoint directory holds. The service reads it (same format)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from training.errors import Refused

FILE = "bimedix.json"


@dataclass(frozen=True)
class Manifest:
    """One checkpoint's identity and contents. `files` maps every other file's name to its sha256."""

    id: str
    base: str
    description: str
    adapter: str | None
    training: str | None
    files: dict[str, str]
    directives: dict[str, str] = field(default_factory=dict)
    directive_use: str = "always"
    dtype: str = "bfloat16"
    languages: tuple[str, ...] = ("en", "ar")
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.id):
            raise Refused(f"{self.id!r} is no checkpoint id: letters, digits, '.', '_' and '-', at most 100")

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file in `directory` but the manifest."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != FILE}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
