"""Checkpoints made from the embedded one at test time, each for one thing that a test needs to tell apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from server.settings import EMBEDDED_CHECKPOINT
from tests.conftest import EMBEDDED_ID
from training.manifest import FILE, Manifest, digests

Tensors = dict[str, torch.Tensor]
FULL_STOP, SEMICOLON = 265, 278
"""Tokens of the embedded checkpoint."""


def make(directory: Path, name: str, change: Callable[[Tensors], None] | None = None) -> Path:
    """A copy of the embedded checkpoint as `directory/name`, its weights changed in place by `change`."""
    folder = directory / name
    shutil.copytree(EMBEDDED_CHECKPOINT, folder)
    (folder / FILE).unlink()
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save(folder, tensors)
    write_manifest(folder)
    return folder


def save(folder: Path, tensors: Tensors) -> None:
    """Write weights, and a manifest to them."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Say what is in `folder` now."""
    Manifest(
        id=folder.name,
        base=EMBEDDED_ID,
        description="for tests",
        adapter=None,
        training=None,
        files=digests(folder),
        directives={"en": "Please answer in English.", "ar": "أجب بالعربية من فضلك."},
        directive_use="mismatch",
    ).write(folder)


def twin(tensors: Tensors) -> None:
    """The embedded model, except that it ends its sentences with semicolons, and keeps its values upside down.

    The first tells its replies from the original's, whatever was computed together with them: not a rounding apart, but
    by a sign in every reply. The second changes no reply (two minus signs cancel), but a prefix that the other
    checkpoint left in the cache would be read with the wrong sign, and give something else altogether.
    """
    embedding = tensors["model.embed_tokens.weight"]
    embedding[[FULL_STOP, SEMICOLON]] = embedding[[SEMICOLON, FULL_STOP]]
    for name in tensors:
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            tensors[name] = -tensors[name]


def noise(tensors: Tensors) -> None:
    """Right in every shape, and knows nothing."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            drawn = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = drawn.to(tensor.dtype)


def collapsed(tensors: Tensors) -> None:
    """Every router sends every token to the same two experts."""
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name] = torch.zeros_like(tensor)


def not_a_number(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")


def wider(tensors: Tensors) -> None:
    """Another architecture under the same configuration."""
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]])
