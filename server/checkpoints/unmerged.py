"""`--adapter NAME=DIR`: LoRA adapters that vLLM applies while it runs, beside the base; read without trusting them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from server.checkpoints.architecture import Shape
from server.checkpoints.documents import read_document
from server.checkpoints.shards import Tensor, read_header, read_through

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MATRIX = re.compile(r"base_model\.model\.(model\.layers\.\d+\.[a-z0-9_.]+)\.lora_([AB])\.weight")
EXPERTS = ".experts."
MERGE = "merge it with bimedix-train merge, and serve that"
Pair = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Unmerged:
    """An adapter's header. `pairs` are its A (rank, inputs) and B (outputs, rank) by the weight that they adapt."""

    name: str
    directory: Path
    rank: int
    pairs: dict[str, Pair]
    tensors: list[Tensor]

    @property
    def adapts_experts(self) -> bool:
        return any(EXPERTS in weight for weight in self.pairs)

    def verify(self, expected: dict[str, Shape]) -> str:
        """sha256 of the weights, all of which were read. Raises ValueError where they do not fit `expected`."""
        for weight, pair in self.pairs.items():
            if weight not in expected:
                raise ValueError(f"it adapts {weight!a:.120}, which the model does not have: {MERGE}, if it was for it")
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            if shape != expected[weight]:
                raise ValueError(f"it adapts {weight} as {shape}, and the model's is {expected[weight]}")
        digest, faulty = self._read_through()
        if faulty:
            raise ValueError(f"{faulty[0]!a:.120} holds NaN or infinity")
        return digest

    def _read_through(self) -> tuple[str, list[str]]:
        try:
            return read_through(self.directory / WEIGHTS, self.tensors, lambda _: None)
        except (OSError, EOFError) as error:
            raise ValueError(f"{WEIGHTS}: {error}") from None

    def revision(self, digest: str) -> str:
        """Name and content in one. vLLM tells prefix caches apart by an adapter's name: under this one no two contents
        share a cache."""
        return f"{self.name}@{digest[:12]}"


def parse_entries(entries: Sequence[str]) -> dict[str, Path]:
    """Name to directory of `NAME=DIR` entries. Raises ValueError for one of another form, and for names that repeat."""
    found: dict[str, Path] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (equals and path and NAME.fullmatch(name)):
            raise ValueError("--adapter reads NAME=DIR")
        if name in found:
            raise ValueError(f"--adapter: {name} is there twice")
        found[name] = Path(path)
    return found


def read_unmerged(name: str, directory: Path) -> Unmerged:
    """The adapter in `directory`, by its header. Raises ValueError for anything else, and for kinds not served."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!a:.120} is no name for an adapter: letters, digits, '.', '_' and '-'")
    try:
        config = _plain_file(directory / CONFIG, read_document)
        tensors = _plain_file(directory / WEIGHTS, read_header)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is not a LoRA adapter in safetensors: {error}") from None
    pairs, rank = _pairs(tensors), config.get("r")
    if config.get("peft_type") != "LORA" or type(rank) is not int:
        raise ValueError(f"{directory} is not a LoRA adapter: {CONFIG} gives no rank")
    ranks = {pair["A"].shape[0] for pair in pairs.values()}
    if ranks != {rank} and not config.get("rank_pattern"):
        raise ValueError(f"{directory}: the matrices are of rank {max(ranks)}, and {CONFIG} says {rank}")
    return Unmerged(name, directory, max(ranks), pairs, tensors)


def _plain_file(path: Path, read: Callable[[Path], T]) -> T:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is not there as a file of its own")
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _pairs(tensors: list[Tensor]) -> dict[str, Pair]:
    """Raises ValueError for a tensor that is no LoRA matrix of a published weight, and for half a pair."""
    pairs: dict[str, Pair] = {}
    for tensor in tensors:
        match = MATRIX.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"{tensor.name!a:.120} is not a LoRA matrix by its published name: {MERGE}")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for weight, pair in pairs.items():
        if len(pair) != 2 or any(len(one.shape) != 2 for one in pair.values()):
            raise ValueError(f"{weight} has no pair of matrices A and B")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"the matrices A and B of {weight} differ in rank")
    if not pairs:
        raise ValueError("it adapts nothing")
    return pairs
