"""Proves that a checkpoint directory is what its manifest says and can be loaded without surprises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.checkpoints.registry import Checkpoint

Progress = Callable[[str, int, int], None]
"""Told what is being done ("copying", "verifying"), the bytes that are done, and how many there are."""


def inspect(checkpoint: Checkpoint, serving: Path | None) -> list[str]:
    """The problems that show without reading the weights: seconds for any size."""
    return []


def verify(checkpoint: Checkpoint, serving: Path | None, progress: Progress | None = None) -> None:
    """Raises InvalidCheckpoint with every problem that was found. May be called from any thread.

    With `serving`, the directory of the checkpoint in service, also checks that the two differ in weights only.
    """
