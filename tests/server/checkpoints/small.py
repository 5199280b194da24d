"""Small checkpoints that pass every check, for tests to spoil one thing at a time."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from server.checkpoints.architecture import expected_tensors
from server.checkpoints.manifest import FILE, Manifest, read_manifest, sha256
from server.settings import EMBEDDED_CHECKPOINT

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "vocab_size": 64,
}
TYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name to safetensors type, shape and bytes."""


def make_checkpoint(
    directory: Path, id: str = "small-1", *, seed: int = 1, shards: int = 1, dtype: str = "bfloat16", **shape: int
) -> Path:
    """A checkpoint of the embedded one's tokenizer and template around a few random kilobytes."""
    directory.mkdir(parents=True)
    for path in EMBEDDED_CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, directory / path.name)
    config = {**read(directory / "config.json"), **SHAPE, **shape}
    write(directory / "config.json", config)
    tensors = random_tensors(config, dtype, seed)
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names if shards > 1 else [SHARD]):
        write_shard(directory / name, {key: tensors[key] for key in list(tensors)[number::shards]})
    if shards > 1:
        places = {key: names[number % shards] for number, key in enumerate(tensors)}
        write(directory / INDEX, {"metadata": {}, "weight_map": places})
    return sign(directory, id=id, dtype=dtype, description="A small checkpoint for tests.")


def random_tensors(config: dict[str, Any], dtype: str, seed: int) -> Tensors:
    generator = np.random.default_rng(seed)
    kind, width = TYPES[dtype]
    made = {}
    for name, shape in expected_tensors(config).items():
        # Every exponent bit pattern but the highest, which is that of NaN and infinity.
        values = generator.integers(0, 256, (prod(shape), width), dtype=np.uint8)
        values[:, -1] &= 0xBB
        made[name] = (kind, shape, values.tobytes())
    return made


def write_shard(path: Path, tensors: Tensors, **changes: Any) -> None:
    """A safetensors file; `changes` replace entries of its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    raw_shard(path, json.dumps({**header, **changes}).encode(), b"".join(data for _, _, data in tensors.values()))


def raw_shard(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def read_shard(path: Path) -> Tensors:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    return {
        name: (entry["dtype"], tuple(entry["shape"]), content[slice(*(start + at for at in entry["data_offsets"]))])
        for name, entry in header.items()
    }


def sign(directory: Path, **changes: Any) -> Path:
    """Writes the manifest that is true of the files as they are now, with `changes` to its other fields."""
    known = read_manifest(directory)
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != FILE}
    fields = {**(known.model_dump(mode="json") if known else {}), **changes, "files": files}
    write(directory / FILE, Manifest.model_validate(fields).model_dump(mode="json"))
    return directory


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file."""
    write(path, {**read(path), **values})
