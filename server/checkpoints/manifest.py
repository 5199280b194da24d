"""`bimedix.json`: what a checkpoint directory says of itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

FILE = "bimedix.json"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
CheckpointId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Manifest(BaseModel):
    """One checkpoint's identity and contents. `files` maps every other file's name to its sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: CheckpointId
    base: str
    description: str
    dtype: Literal["bfloat16", "float16", "float32"]
    created: AwareDatetime
    languages: tuple[Literal["en", "ar"], ...]
    directives: dict[Literal["en", "ar"], str] = Field(
        default={}, description="What asks the model for a language, put after the user's text; none where none helps."
    )
    directive_use: Literal["always", "mismatch"] = Field(
        default="always",
        description="Whether each turn needs its directive, or only one in another language.",
    )
    adapter: Digest | None = Field(default=None, description="sha256 of the adapter that was merged in.")
    training: Digest | None = Field(default=None, description="sha256 of the training configuration.")
    files: dict[str, Digest]


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in `directory`, or None where there is none. Raises ValueError when it is malformed."""
    try:
        text = (directory / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{directory / FILE} is not a manifest: {error.errors()[0]['msg']}") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
