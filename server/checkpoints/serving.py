"""Which checkpoint a reply comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.checkpoints.manifest import Manifest, read_manifest
from server.language.guide import UNKNOWN_CHECKPOINT, Directives


@dataclass(frozen=True)
class Serving:
    """A checkpoint as the engine has it loaded. `source` is its directory, or a hub id."""

    id: str
    source: str
    manifest: Manifest | None

    @property
    def directives(self) -> Directives:
        """What asks this checkpoint for a language."""
        if self.manifest is None:
            return UNKNOWN_CHECKPOINT
        return Directives(self.manifest.directives, self.manifest.directive_use)

    @property
    def directory(self) -> Path | None:
        """Where its files are; None for a hub id."""
        path = Path(self.source)
        return path if path.is_dir() else None


def read_serving(source: str) -> Serving:
    """The checkpoint at `source`. Raises ValueError when its manifest is malformed."""
    manifest = read_manifest(Path(source))
    return Serving(manifest.id if manifest else Path(source).name, source, manifest)
