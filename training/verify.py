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
LARGEST_ERROR = 0.02
"""Of a layer's output for a token, relative to what the layer adds; rounding weights to bf16 costs about 0.003."""

REROUTED = 0.15
"""Share of tokens that may differ by more: rounding sends a token whose router is undecided to another expert."""


@dataclass(frozen=True)
class Likeness:
    """`error`: the largest over the layers of the median over tokens of the relative error. `rerouted`: the share of
    tokens, over all layers, that differ by more than LARGEST_ERROR. `logits_error`: the median of the logits' error."""

    error: float
    rerouted: float
    logits_error: float


class Tensors:
    """The tensors of a checkpoint directory by name, read when asked for, in fp32."""

    def __init__(self, directory: Path) -> None:
        self.places = {name: path for path in shards(directory) for name in header(path)[0]}

    def __call__(self, name: str) -> torch.Tensor:
        with safe_open(self.places[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.float()

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): self(name) for name in self.places if name.startswith(prefix)}


@torch.inference_mode()
def compare(base: Path, merged: Path, adapter: Adapter, config: UnfusedMixtralConfig) -> Likeness:
    """Each merged layer against the base's with PEFT's LoRA around it, from the same inputs, on sample prompts.

    Raises Refused when they differ by more than the rounding of weights to bf16 explains.
    """
    config._attn_implementation = "eager"
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    before, after = Tensors(base), Tensors(merged)
    embeddings = before("model.embed_tokens.weight")
    hidden = [nn.functional.embedding(torch.tensor([tokenizer(prompt)["input_ids"]]), embeddings) for prompt in PROMPTS]
    found, errors = hidden, []
    for index in range(config.num_hidden_layers):
        expected = _through(_adapted(index, before, adapter, config), hidden, config)
        found = _through(_plain(index, after, config), hidden, config)
        errors.append(_errors(expected, found, hidden))
        if float((errors[-1] > LARGEST_ERROR).float().mean()) > REROUTED:
            raise Refused(f"layer {index} of the merged checkpoint differs from the adapted one by {_median(errors)}")
        hidden = expected
    one, other = (_logits(rows, tensors, config) for rows, tensors in ((hidden, before), (found, after)))
    return Likeness(
        error=round(max(float(error.median()) for error in errors), 5),
        rerouted=round(float((torch.cat(errors) > LARGEST_ERROR).float().mean()), 5),
        logits_error=round(float(((one - other).norm(dim=-1) / one.norm(dim=-1)).median()), 5),
    )


def _errors(expected: list[torch.Tensor], found: list[torch.Tensor], before: list[torch.Tensor]) -> torch.Tensor:
    """(tokens of all rows)"""
    pairs = zip(expected, found, before, strict=True)
    return torch.cat([((e - f).norm(dim=-1) / (e - b).norm(dim=-1)).flatten() for e, f, b in pairs])


def _median(errors: list[torch.Tensor]) -> str:
    return f"{float(errors[-1].median()):.1%}"


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
        lora = LoraConfig(
            r=a.shape[0],
            lora_alpha=scaling * a.shape[0],
            target_modules=[leaf],
            init_lora_weights=False,
        )
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


def _through(layer: nn.Module, rows: list[torch.Tensor], config: UnfusedMixtralConfig) -> list[torch.Tensor]:
    rotary = MixtralRotaryEmbedding(config)
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
