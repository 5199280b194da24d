"""Tells one base checkpoint from another without reading all of it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from training.errors import Refused

SAMPLE = 1024
"""Bytes read of each tensor."""


def shards(base: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in name order. Raises Refused when there is none."""
    index = base / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise Refused(f"{index} names files outside its directory")
        missing = [name for name in names if not (base / name).is_file()]
        if missing:
            raise Refused(f"{base} lacks {missing[0]}, which its index names")
        return [base / name for name in names]
    found = sorted(base.glob("*.safetensors"))
    if not found:
        raise Refused(f"{base} holds no safetensors weights")
    return found


def header(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The tensors of a safetensors file (dtype, shape, data_offsets) and where their bytes begin. Raises ValueError."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else path.stat().st_size
        if 8 + length > path.stat().st_size:
            raise Refused(f"{path} is not a safetensors file")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def base_fingerprint(base: str | Path, revision: str | None = None) -> str:
    """sha256 over every tensor's name, dtype, shape and first bytes: the same however the weights are sharded."""
    directory = resolve(base, revision)
    digest = hashlib.sha256()
    for line in sorted(_lines(directory)):
        digest.update(line)
    return digest.hexdigest()


def resolve(base: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: `base` itself, or where the Hub's cache keeps that id."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(base), revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"]))


def _lines(directory: Path) -> Iterator[bytes]:
    for path in shards(directory):
        entries, start = header(path)
        with path.open("rb") as file:
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                sample = file.read(min(SAMPLE, end - begin))
                yield f"{name} {entry['dtype']} {entry['shape']} ".encode() + hashlib.sha256(sample).digest()
