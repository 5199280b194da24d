"""Compares a merged checkpoint with its base under the unmerged adapter, layer by layer, so that any size fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from training.adapters import Adapter
from training.errors import Refused
from training.fingerprint import header, shards
from training.mixtral import DecoderLayer, UnfusedMixtralConfig

PROMPTS = (
    "USER: I have had a headache for three days. What should I do? ASSISTANT:",
    "USER: عندي صداع منذ ثلاثة أيام. ماذا أفعل؟ ASSISTANT:",
    "USER: Which vitamin is made in the skin? Options: A. A B. B12 C. C D. D ASSISTANT: The correct answer is D.",
)
LARGEST_ERROR = 0.1


@dataclass(frozen=True)
class Likeness:
    """Of the logits on the sample prompts: the relative error in norm, and the share of equal next tokens."""

    relative_error: float
    same_next_token: float


class Tensors:
    """The tensors of a checkpoint directory by name, read when asked for, in fp32."""

    def __init__(self, directory: Path) -> None:
        self.places = {name: path for path in shards(directory) for name in header(path)[0]}

    def __call__(self, name: str) -> torch.Tensor:
        with safe_open(self.places[name], "pt") as file:
            return file.get_tensor(name).float()

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): self(name) for name in self.places if name.startswith(prefix)}


@torch.inference_mode()
def compare(base: Path, merged: Path, adapter: Adapter, config: UnfusedMixtralConfig) -> Likeness:
    """Raises Refused when the merged checkpoint is not the base with its adapter, up to bf16 rounding."""
    config._attn_implementation = "eager"
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    before, after = Tensors(base), Tensors(merged)
    embeddings = before("model.embed_tokens.weight")
    expected = [nn.functional.embedding(row, embeddings) for row in ids]
    found = list(expected)
    del embeddings
    rotary = MixtralRotaryEmbedding(config)
    for index in range(config.num_hidden_layers):
        expected = _through(_adapted(index, before, adapter, config), expected, rotary)
        found = _through(_plain(index, after, config), found, rotary)
    one, other = (_logits(hidden, tensors, config) for hidden, tensors in ((expected, before), (found, after)))
    error = float((one - other).norm() / one.norm())
    if not error < LARGEST_ERROR:
        raise Refused(f"the merged checkpoint's logits differ from the adapter's by {error:.1%}")
    return Likeness(round(error, 6), round(float((one.argmax(-1) == other.argmax(-1)).float().mean()), 4))


def _plain(index: int, tensors: Tensors, config: UnfusedMixtralConfig) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(config, index)
    layer.load_state_dict(tensors.state(f"model.layers.{index}."), assign=True)
    return layer.eval()


def _adapted(index: int, tensors: Tensors, adapter: Adapter, config: UnfusedMixtralConfig) -> nn.Module:
    """The layer of the base with PEFT's own LoRA around it."""
    prefix = f"model.layers.{index}."
    layer = _plain(index, tensors, config)
    names = [name for name in adapter.deltas if name.startswith(prefix)]
    for name in names:
        module = name.removeprefix(prefix).removesuffix(".weight")
        a, b, scaling = adapter.pair(name)
        inner, _, leaf = module.rpartition(".")
        lora = LoraConfig(r=a.shape[0], lora_alpha=scaling * a.shape[0], target_modules=[leaf], init_lora_weights=False)
        parent = inject_adapter_in_model(lora, _Alone(leaf, layer.get_submodule(module)))
        wrapped = getattr(parent, leaf)
        wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data = a, b
        setattr(layer.get_submodule(inner), leaf, wrapped)
    return layer


class _Alone(nn.Module):
    """A module in a model of its own, for PEFT to wrap."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)


def _through(layer: nn.Module, rows: list[torch.Tensor], rotary: MixtralRotaryEmbedding) -> list[torch.Tensor]:
    return [_forward(layer, hidden, rotary) for hidden in rows]


def _forward(layer: nn.Module, hidden: torch.Tensor, rotary: MixtralRotaryEmbedding) -> torch.Tensor:
    positions = torch.arange(hidden.shape[1])[None]
    mask = torch.full((hidden.shape[1], hidden.shape[1]), float("-inf")).triu(1)[None, None]
    output: torch.Tensor = layer(
        hidden, position_embeddings=rotary(hidden, positions), attention_mask=mask, position_ids=positions
    )
    return output


def _logits(rows: list[torch.Tensor], tensors: Tensors, config: UnfusedMixtralConfig) -> torch.Tensor:
    """(tokens of all rows, vocabulary)"""
    hidden = torch.cat([row[0] for row in rows])
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return (hidden * tensors("model.norm.weight")) @ tensors(head).T
