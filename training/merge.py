"""`bimedix-train merge`: adds an adapter to its base, tensor by tensor, and writes a checkpoint the service loads.

Memory is bounded by the largest weights in work, not by the checkpoint: shards are read and written at offsets.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from training.adapters import Adapter, BadAdapter, adapter_base, read_adapter
from training.errors import Refused
from training.fingerprint import base_fingerprint, header, resolve, shards
from training.manifest import Manifest, digests
from training.mixtral import UnfusedMixtralConfig, on_meta, unfused_config
from training.rows import TEMPLATE
from training.verify import Likeness, compare

INDEX = "model.safetensors.index.json"
COPIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
BF16_BYTES = 2
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint: its source and where its bf16 bytes go."""

    name: str
    shape: tuple[int, ...]
    source: Path
    target: Path
    offset: int


def merge_adapter(
    adapter_directory: Path,
    output: Path,
    *,
    base: str | None = None,
    checkpoint_id: str | None = None,
    description: str = "",
    directives: dict[str, str] | None = None,
    directive_use: str = "always",
) -> dict[str, Any]:
    """Merges into a new directory `output`; returns the summary that `--json` prints.

    Raises FileExistsError when `output` exists, BadAdapter when the adapter is not one for this base, and Refused
    when the base or the result is not what it should be. Whatever is raised, `output` is not left behind.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already")
    started = time.monotonic()
    name = base or adapter_base(adapter_directory)
    if name is None:
        raise BadAdapter("the adapter does not name its base: pass --base")
    if not Path(name).is_dir() and name.count("/") != 1:
        raise Refused(f"the base {name} does not exist: pass --base")
    source = resolve(name)
    config = unfused_config(source)
    adapter = read_adapter(adapter_directory, config.num_local_experts)
    check_fit(adapter, config, source)
    with _unfinished(output) as folder:
        weights = layout(source, folder, config)
        _write(weights, adapter)
        merged_in = time.monotonic() - started
        _write_rest(source, folder, weights)
        likeness = compare(source, folder, adapter, config)
        manifest = Manifest(
            id=checkpoint_id or f"{output.name}-{adapter.digest[:8]}",
            base=name,
            description=description or f"{Path(name).name} with {adapter_directory.name} merged in",
            adapter=adapter.digest,
            training=adapter.provenance.get("training"),
            directives=directives or {},
            directive_use=directive_use,
            files=digests(folder),
        )
        manifest.write(folder)
    return _summary(output, manifest, weights, likeness, merged_in, time.monotonic() - started)


def check_fit(adapter: Adapter, config: UnfusedMixtralConfig, source: Path) -> None:
    """Raises BadAdapter when the adapter was trained on another base or names what this one has not."""
    trained_on = adapter.provenance.get("base_fingerprint")
    if trained_on and trained_on != base_fingerprint(source):
        raise BadAdapter(f"the adapter was trained on another base than {source}: {adapter.provenance.get('base')}")
    shapes = _expected(config)
    unknown = [weight for weight in adapter.deltas if weight not in shapes]
    if unknown:
        raise BadAdapter(f"the base has no {unknown[0]} ({len(unknown)} such names)")
    for weight in adapter.deltas:
        if adapter.shape_of(weight) != shapes[weight]:
            raise BadAdapter(f"the adapter's {weight} is {adapter.shape_of(weight)}, the base's {shapes[weight]}")
    missing = _siblings_missing(adapter, shapes)
    if missing:
        raise BadAdapter(f"the adapter lacks {missing[0]} ({len(missing)} such names), which it has in other layers")


def _siblings_missing(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What a complete adapter would hold too: LoRA adapts a matrix in every layer and expert or in none."""

    def kind(weight: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in weight.split("."))

    adapted = {kind(weight) for weight in adapter.deltas}
    return [weight for weight in shapes if kind(weight) in adapted and weight not in adapter.deltas]


def _expected(config: UnfusedMixtralConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}


def layout(source: Path, folder: Path, config: UnfusedMixtralConfig) -> list[Weight]:
    """Every weight of the base with its place in `folder`, where the shards are laid out under the same names.

    Raises Refused when the base lacks a tensor of its architecture, or has one too many or of another shape.
    """
    expected = _expected(config)
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    weights = [weight for shard in shards(source) for weight in _lay_out(shard, folder / shard.name)]
    found = {weight.name: weight.shape for weight in weights}
    faults = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if faults or len(found) != len(weights):
        raise Refused(f"{source} is not the checkpoint its configuration describes: {sorted(faults)[:3]}")
    return weights


def _lay_out(shard: Path, target: Path) -> list[Weight]:
    """Writes the header of `target`, a bf16 copy of `shard` in shape, and makes room for its tensors."""
    entries, _ = header(shard)
    made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in sorted(entries.items()):
        begin, end = end, end + BF16_BYTES * prod(entry["shape"])
        made[name] = {"dtype": "BF16", "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return [
        Weight(name, tuple(entry["shape"]), shard, target, 8 + len(text) + made[name]["data_offsets"][0])
        for name, entry in sorted(entries.items())
    ]


def _write(weights: list[Weight], adapter: Adapter) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(lambda weight: _merge_one(weight, adapter), weights):
            pass


def _merge_one(weight: Weight, adapter: Adapter) -> None:
    """Raises Refused when the base, the adapter or their sum is not finite."""
    with safe_open(weight.source, "pt") as file:
        merged = file.get_tensor(weight.name).float()
    if weight.name in adapter.deltas:
        merged += adapter.delta(weight.name)
    merged = merged.to(torch.bfloat16)
    if not bool(merged.isfinite().all()):
        raise Refused(f"{weight.name} would hold NaN or infinity in bf16")
    data = memoryview(merged.contiguous().view(torch.uint8).flatten().numpy())
    with weight.target.open("r+b") as file:
        file.seek(weight.offset)
        file.write(data)


def _write_rest(source: Path, folder: Path, weights: list[Weight]) -> None:
    """Index, configuration, tokenizer, chat template and generation defaults."""
    if (source / INDEX).exists():
        total = sum(BF16_BYTES * prod(weight.shape) for weight in weights)
        index = {"metadata": {"total_size": total}, "weight_map": {w.name: w.target.name for w in weights}}
        _dump(folder / INDEX, index)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    _dump(folder / "config.json", {**config, "model_type": "mixtral", "dtype": "bfloat16"})
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    _dump(folder / "tokenizer_config.json", tokenizer)
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        _dump(folder / "generation_config.json", tokens)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its name when all is written and is removed otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    try:
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder.chmod(0o755)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _summary(
    output: Path, manifest: Manifest, weights: list[Weight], likeness: Likeness, merged_in: float, seconds: float
) -> dict[str, Any]:
    return {
        "checkpoint": str(output),
        "id": manifest.id,
        "parameters": sum(prod(weight.shape) for weight in weights),
        "merge_seconds": round(merged_in, 2),
        "seconds": round(seconds, 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "layer_error": likeness.error,
        "rerouted": likeness.rerouted,
        "logits_error": likeness.logits_error,
    }
