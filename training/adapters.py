"""Reads a LoRA adapter from disk without trusting it, onto the names of the published Mixtral checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from training.errors import Refused
from training.fingerprint import header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "bimedix_adapter.json"
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
)
"""PEFT features whose weights are more than W + scaling x B A; refused where they are used."""

RENAMED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class BadAdapter(Refused):
    """The adapter can't be merged; the message says why."""


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: `scaling` x B A.

    `a` and `b` name tensors of the file. Fused experts share a pair: `expert` picks this weight's part and, where w1
    and w3 are one matrix, `half` (0 or 1) its rows.
    """

    a: str
    b: str
    rank: int
    scaling: float
    expert: int | None = None
    half: int | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter that was checked; its tensors are read when asked for."""

    path: Path
    base: str | None
    provenance: dict[str, Any]
    deltas: dict[str, Delta]
    shapes: dict[str, tuple[int, ...]]

    @property
    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delta(self, weight: str) -> torch.Tensor:
        """What to add to `weight`, (outputs, inputs) in fp32. Raises BadAdapter when it is not finite."""
        a, b, scaling = self.pair(weight)
        return (b @ a) * scaling

    def pair(self, weight: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (rank, inputs) and B (outputs, rank) of `weight` in fp32, and the scaling. Raises BadAdapter likewise."""
        entry = self.deltas[weight]
        with safe_open(self.path, "pt") as file:
            a, b = file.get_tensor(entry.a).float(), file.get_tensor(entry.b).float()
        for name, matrix in ((entry.a, a), (entry.b, b)):
            if not bool(matrix.isfinite().all()):
                raise BadAdapter(f"{name} holds NaN or infinity")
        if entry.expert is not None:
            a, b = _expert_of_fused(a, b, entry)
        return a, b, entry.scaling

    def shape_of(self, weight: str) -> tuple[int, int]:
        """(outputs, inputs) of the weight that this delta fits."""
        entry = self.deltas[weight]
        outputs, inputs = self.shapes[entry.b][0], self.shapes[entry.a][1]
        return (outputs // 2 if entry.half is not None else outputs), inputs


def _expert_of_fused(a: torch.Tensor, b: torch.Tensor, entry: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT stacks the experts of a 3-D parameter: A is (experts x rank, inputs), B is (outputs, rank x experts)."""
    assert entry.expert is not None
    experts = a.shape[0] // entry.rank
    a = a.view(experts, entry.rank, -1)[entry.expert]
    b = b.view(b.shape[0], entry.rank, experts)[:, :, entry.expert]
    if entry.half is not None:
        b = b.chunk(2)[entry.half]
    return a, b


def read_adapter(directory: Path, experts: int) -> Adapter:
    """The adapter in `directory`. Raises BadAdapter when it is not a plain LoRA adapter in safetensors."""
    if not directory.is_dir():
        raise BadAdapter(f"{directory} is not a directory")
    config = _config(directory)
    path = _weights(directory)
    try:
        entries, _ = header(path)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadAdapter(f"{path} is not a safetensors file: {error}") from None
    deltas = _deltas(shapes, config, experts)
    provenance = directory / PROVENANCE
    known = json.loads(provenance.read_text()) if provenance.is_file() else {}
    return Adapter(path, config.get("base_model_name_or_path"), known, deltas, shapes)


def adapter_base(directory: Path) -> str | None:
    """The base an adapter names. Raises BadAdapter when its configuration can't be read."""
    base = _config(directory).get("base_model_name_or_path")
    return str(base) if base else None


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadAdapter(f"{directory / CONFIG} can't be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadAdapter(f"{directory} is not a LoRA adapter")
    used = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise BadAdapter(f"the adapter uses {', '.join(used)}, which can't be merged as W + B A")
    if not isinstance(config.get("r"), int) or config["r"] < 1 or "lora_alpha" not in config:
        raise BadAdapter("the adapter's configuration gives no rank or no alpha")
    return config


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS
    if not path.exists():
        pickles = [file.name for suffix in ("bin", "pt", "pth", "pkl") for file in directory.glob(f"*.{suffix}")]
        if pickles:
            raise BadAdapter(f"{pickles[0]} is a pickle, which can run code when it is read: save it as safetensors")
        raise BadAdapter(f"{directory} holds no {WEIGHTS}")
    if path.is_symlink() and path.resolve().parent != directory.resolve():
        raise BadAdapter(f"{path} points outside its directory")
    return path


def _deltas(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], experts: int) -> dict[str, Delta]:
    """Checkpoint weight to its pair. Raises BadAdapter for a name that is no LoRA matrix, or half a pair."""
    modules: dict[str, dict[str, str]] = {}
    for name in shapes:
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not match or not all(part.isidentifier() or part.isdigit() for part in match[1].split(".")):
            raise BadAdapter(f"{name} is not the name of a LoRA matrix")
        modules.setdefault(match[1], {})[match[2]] = name
    deltas: dict[str, Delta] = {}
    for module, pair in modules.items():
        if set(pair) != {"A", "B"}:
            raise BadAdapter(f"{module} has lora_{min(pair)} only")
        rank, scaling = _strength(module, config)
        _check_rank(shapes, pair, rank * (experts if _fused(module) else 1))
        for weight, delta in _targets(module, Delta(pair["A"], pair["B"], rank, scaling), experts):
            if weight in deltas:
                raise BadAdapter(f"{weight} is adapted twice")
            deltas[weight] = delta
    if not deltas:
        raise BadAdapter("the adapter is empty")
    return deltas


def _strength(module: str, config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scaling of a module. PEFT doubles both for gate_up_proj where w1 and w3 were asked for."""
    name = f"{module.removesuffix('.base_layer')}.{_fused(module)}" if _fused(module) else module

    def of(pattern: str, default: Any) -> Any:
        found = config.get(pattern) or {}
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    rank, alpha = int(of("rank_pattern", config["r"])), float(of("alpha_pattern", config["lora_alpha"]))
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_rank(shapes: dict[str, tuple[int, ...]], pair: dict[str, str], rank: int) -> None:
    a, b = shapes[pair["A"]], shapes[pair["B"]]
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise BadAdapter(f"{pair['A']} {a} and {pair['B']} {b} do not fit rank {rank}")


def _fused(module: str) -> str | None:
    """The 3-D parameter a module adapts. PEFT wraps gate_up_proj first, so it is the inner (base) layer."""
    if module.endswith(".experts.base_layer"):
        return "gate_up_proj"
    return "down_proj" if module.endswith(".experts") else None


def _targets(module: str, delta: Delta, experts: int) -> list[tuple[str, Delta]]:
    """The checkpoint weights that a module's pair adapts."""
    name = module.replace(".mlp.", ".block_sparse_moe.")
    if not _fused(name):
        head, _, leaf = name.rpartition(".")
        leaf = RENAMED.get(leaf, leaf) if ".experts." in name else leaf
        return [(f"{head}.{leaf}.weight", delta)]
    root = name.removesuffix(".base_layer")
    halves = {"w1": 0, "w3": 1} if _fused(name) == "gate_up_proj" else {"w2": None}
    return [
        (f"{root}.{expert}.{matrix}.weight", replace(delta, expert=expert, half=half))
        for expert in range(experts)
        for matrix, half in halves.items()
    ]
