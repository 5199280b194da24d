"""What a run proves of itself before it is let go on. Every check raises ProofFailed with what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, TrainerCallback

from training.errors import Refused
from training.mixtral import EXPERT_MATRICES, MixtralSparseMoeBlock, adapter_parameters
from training.router import Balance

IGNORED = -100


class ProofFailed(Refused):
    """The run would not do what its recipe says."""


def full_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 keeps only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def adapter_is_complete(model: nn.Module, config: MixtralConfig, rank: int) -> int:
    """The number of trainable parameters, which must be the closed formula's."""
    trainable = sum(full_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    expected = adapter_parameters(config, rank)
    if trainable != expected:
        raise ProofFailed(f"{trainable:,} parameters are trainable, the recipe's adapter has {expected:,}")
    return trainable


def experts_are_4bit(model: nn.Module) -> int:
    """The number of expert matrices, every one of which must be NF4 with double quantisation."""
    from bitsandbytes.nn.modules import Linear4bit

    found = 0
    for name, block in model.named_modules():
        if not isinstance(block, MixtralSparseMoeBlock):
            continue
        for index, expert in enumerate(block.experts):
            for matrix in EXPERT_MATRICES:
                layer = getattr(expert, matrix)
                layer = getattr(layer, "base_layer", layer)
                state = getattr(layer.weight, "quant_state", None)
                if not isinstance(layer, Linear4bit) or state is None or state.quant_type != "nf4" or not state.nested:
                    raise ProofFailed(f"{name}.experts.{index}.{matrix} is not NF4 with double quantisation")
                found += 1
    if not found:
        raise ProofFailed("the model has no expert matrix")
    return found


class FirstStep(TrainerCallback):
    """Watches the first optimiser step: gradients reach every adapter tensor, masked positions cost nothing.

    Hooks see what flows, so this holds under ZeRO too, where gradients are moved away as they come. In a first step
    LoRA's B is zero, hence the gradient of A is too: A must get one, and B must get one that is not zero unless the
    router sent its expert no token.
    """

    def __init__(self, model: nn.Module, eos: int, balance: Balance) -> None:
        self.eos = eos
        self.balance = balance
        self.gradients: dict[str, bool] = {}
        self.trained_positions = 0
        self.ends = 0
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.hooks: list[Any] = [
            parameter.register_hook(self._watch(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _watch(self, name: str) -> Any:
        def seen(gradient: torch.Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                raise ProofFailed(f"the gradient of {name} is not finite")
            self.gradients[name] = self.gradients.get(name, False) or bool(gradient.any())

        return seen

    def check_loss(self, model: nn.Module, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """In the first step: `loss` is the summed cross-entropy of the labelled positions, computed another way."""
        if not self.hooks:
            return
        labels, ids = inputs["labels"], inputs["input_ids"]
        trained = labels != IGNORED
        if not torch.equal(labels[trained], ids[trained]):
            raise ProofFailed("labels differ from the tokens they stand for")
        after = trained[:, 1:]
        with torch.no_grad():
            row = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**row, use_cache=False).logits[:, :-1][after].float()
        expected = nn.functional.cross_entropy(logits, ids[:, 1:][after], reduction="sum")
        if not torch.allclose(loss.detach().float(), expected, rtol=5e-3):
            raise ProofFailed("positions outside the assistant's turns contribute to the loss")
        self.trained_positions += int(after.sum())
        self.ends += int((labels == self.eos).sum())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.conclude()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.conclude()

    def conclude(self) -> None:
        """Once, after the first backward passes. Raises ProofFailed."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        missing = [name for name in self.names if name not in self.gradients]
        if missing:
            raise ProofFailed(f"{len(missing)} adapter tensors got no gradient, first {missing[0]}")
        idle = self.balance.idle_experts()
        still = [
            name
            for name, moved in self.gradients.items()
            if not moved and ".lora_B." in name and not any(expert in name for expert in idle)
        ]
        if still:
            raise ProofFailed(f"{len(still)} adapter tensors got a zero gradient, first {still[0]}")
        if not self.ends or not self.trained_positions:
            raise ProofFailed("no reply, or no end of a reply, is trained on in the first step")
