"""Makes a checkpoint of an adapter with `bimedix-train merge`, which has a process and dependencies of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from server.checkpoints.errors import CheckpointError
from server.checkpoints.manifest import read_manifest

CONFIG = "adapter_config.json"


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def merge(adapter: Path, parent: Path, base: str | None = None, id: str | None = None) -> Path:
    """Merges `adapter` into a new directory in `parent`, and returns it. The base's directives go with it.

    `base` and `id` are what `bimedix-train merge` takes when they are None. Raises CheckpointError.
    """
    if find_spec("peft") is None or find_spec("trl") is None:
        raise CheckpointError(
            f"{adapter} is an adapter, and the tools that merge one are not installed here: install bimedix[train], or "
            "run `bimedix-train merge ADAPTER --base BASE --output DIR` where they are and add DIR"
        )
    output = parent / adapter.resolve().name
    options = {"--output": str(output), "--base": base, "--id": id, **_directives(base or _named_base(adapter))}
    given = [f"{flag}={value}" for flag, value in options.items() if value is not None]
    command = [sys.executable, "-m", "training.cli", "merge", *given, "--", str(adapter)]
    # No shell, and no argument that could be read as another flag.
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)  # noqa: S603
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"{adapter} was not merged: {said[-1].removeprefix('error: ')}")
    return output


def _named_base(adapter: Path) -> str | None:
    try:
        base = json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # The merge says what is wrong with it.
    return base if isinstance(base, str) else None


def _directives(base: str | None) -> dict[str, str]:
    """What asks the base for a language asks its fine-tunes too."""
    try:
        manifest = read_manifest(Path(base)) if base else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the base cannot be read: {error}") from None
    if manifest is None or not manifest.directives:
        return {}
    flags = {f"--directive-{language}": text for language, text in manifest.directives.items()}
    return {**flags, "--directive-use": manifest.directive_use}
