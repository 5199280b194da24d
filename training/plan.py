"""What a run will train and how much memory each GPU needs, from the configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from training.mixtral import UnfusedMixtralConfig, adapter_parameters, on_meta, unfused_config
from training.recipe import Recipe

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight: 4 bits, an 8-bit scale per 64 weights, and an fp32 scale per 256 of those (QLoRA, section 3)."""

LOGIT_BYTES = 2 + 4 + 4
"""Bytes a logit: bf16, its fp32 copy and its gradient."""


@dataclass(frozen=True)
class Plan:
    """Parameters, and bytes per GPU by part."""

    base_parameters: int
    trainable_parameters: int
    quantised_parameters: int
    gpus: int
    zero: int
    rows_a_step: int
    bytes_per_gpu: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes_per_gpu.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes_per_gpu": self.total}

    def table(self) -> str:
        share = self.trainable_parameters / self.base_parameters
        lines = [
            f"base parameters       {self.base_parameters:>16,}",
            f"  of them in 4 bits   {self.quantised_parameters:>16,}",
            f"trainable parameters  {self.trainable_parameters:>16,}  {share:.2%} of the base",
            f"rows a step           {self.rows_a_step:>16,}  on {self.gpus} GPU(s), ZeRO {self.zero}",
            "",
            "memory per GPU, GiB",
            *(f"  {part:32}{size / GIB:8.2f}" for part, size in self.bytes_per_gpu.items()),
            f"  {'total':32}{self.total / GIB:8.2f}",
        ]
        return "\n".join(lines)


def plan_for(recipe: Recipe) -> Plan:
    """Raises Refused when the base is not there or not Mixtral. Reads the base's config.json only."""
    recipe.check_base()
    return make_plan(recipe, unfused_config(recipe.base, recipe.revision))


def make_plan(recipe: Recipe, config: UnfusedMixtralConfig) -> Plan:
    names = {name: parameter.numel() for name, parameter in on_meta(config).named_parameters()}
    base, trainable = sum(names.values()), adapter_parameters(config, recipe.lora.rank)
    matrices = sum(size for name, size in names.items() if ".experts." in name or "_proj." in name)
    quantised = matrices if recipe.quantization == "nf4" else 0
    return Plan(
        base_parameters=base,
        trainable_parameters=trainable,
        quantised_parameters=quantised,
        gpus=recipe.gpus,
        zero=recipe.zero,
        rows_a_step=recipe.optimiser.effective_batch,
        bytes_per_gpu=_memory(recipe, config, base, quantised, trainable),
    )


def _memory(recipe: Recipe, config: UnfusedMixtralConfig, base: int, quantised: int, trainable: int) -> dict[str, int]:
    """Without ZeRO adapter, gradients and AdamW's two moments are fp32; with it the adapter is bf16 with an fp32
    master copy, which ZeRO partitions with gradients and moments (2), and with the weights (3)."""
    parts = recipe.gpus if recipe.zero else 1
    whole = recipe.gpus if recipe.zero == 3 else 1
    sharded = bool(recipe.zero)
    tokens = recipe.optimiser.per_device_batch * recipe.data.max_length
    return {
        "base in 4 bits": int(quantised * NF4_BYTES / whole),
        "base in bf16": 2 * (base - quantised) // whole,
        "adapter": (2 if sharded else 4) * trainable // whole,
        "gradients": (2 if sharded else 4) * trainable // parts,
        "optimiser states": (12 if sharded else 8) * trainable // parts,
        "activations": _activations(recipe, config, tokens),
        "logits and loss": LOGIT_BYTES * tokens * config.vocab_size,
    }


def _activations(recipe: Recipe, config: UnfusedMixtralConfig, tokens: int) -> int:
    """Kept inputs of every layer, and what one layer (or, without checkpointing, every layer) keeps for backward.

    A layer keeps about 12 hidden-sized bf16 tensors around attention, and for each of the experts a token goes to two
    hidden-sized and four FFN-sized ones, all with the LoRA branches' fp32 copies, which double them.
    """
    hidden, width, chosen = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    layer = 2 * 2 * tokens * (12 * hidden + chosen * (2 * hidden + 4 * width))
    kept = 2 * tokens * hidden * config.num_hidden_layers
    return kept + layer if recipe.gradient_checkpointing else layer * config.num_hidden_layers
