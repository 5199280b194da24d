"""LoRA adapters for the embedded checkpoint, with random weights that change what it says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.checkpoints.architecture import expected_tensors
from server.settings import EMBEDDED_CHECKPOINT

ATTENTION = ("q_proj", "k_proj", "v_proj")
RANK = 8


def make_adapter(folder: Path, seed: int, modules: tuple[str, ...] = ATTENTION, rank: int = RANK) -> Path:
    """An adapter on `modules` of every layer, as PEFT writes it."""
    torch.manual_seed(seed)
    shapes = expected_tensors(json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text(encoding="utf-8")))
    tensors = {}
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            name = f"base_model.model.{module}.lora"
            tensors[f"{name}_A.weight"] = torch.randn(rank, shape[1]) / rank**0.5
            tensors[f"{name}_B.weight"] = torch.randn(shape[0], rank) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
