"""How evenly the router spreads tokens over the experts, overall and per language."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import PreTrainedTokenizerBase

from training.mixtral import TopK

LANGUAGES = ("en", "ar")


def token_languages(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """For each token id 0 (Latin letters), 1 (Arabic letters) or 2 (neither: digits, punctuation, byte fallback)."""
    scripts = torch.full((len(tokenizer),), len(LANGUAGES))
    for token, index in tokenizer.get_vocab().items():
        name = next((unicodedata.name(letter, "") for letter in token if letter.isalpha()), "")
        if token.startswith("<"):
            continue
        if name.startswith("ARABIC"):
            scripts[index] = 1
        elif name.startswith("LATIN"):
            scripts[index] = 0
    return scripts


class Balance:
    """Counts, by hooks on the model, which experts the tokens of each language go to while training.

    `counts` is (layers, languages + 1, experts). Gradient checkpointing runs a router twice: shares stay the same.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        routers = [(name, module) for name, module in model.named_modules() if isinstance(module, TopK)]
        self.blocks = [name.removesuffix(".top_k") for name, _ in routers]
        experts = len(list(model.get_submodule(f"{self.blocks[0]}.experts").children()))
        self.scripts = token_languages(tokenizer)
        self.counts = torch.zeros(len(routers), len(LANGUAGES) + 1, experts)
        self.tokens: torch.Tensor | None = None
        model.register_forward_pre_hook(self._remember, with_kwargs=True)
        for layer, (_, router) in enumerate(routers):
            router.register_forward_hook(self._count(layer))

    def _remember(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens = None
        if not model.training:
            return
        ids = kwargs["input_ids"]
        self.scripts = self.scripts.to(ids.device)
        self.tokens = self.scripts[ids.clamp(max=len(self.scripts) - 1)].flatten()

    def _count(self, layer: int) -> Any:
        def count(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            chosen = output[2]
            if self.tokens is None or len(self.tokens) != len(chosen):
                return
            self.counts = self.counts.to(chosen.device)
            experts = self.counts.shape[-1]
            cells = self.tokens[:, None] * experts + chosen
            self.counts[layer] += cells.flatten().bincount(minlength=self.counts[layer].numel()).view(-1, experts)

        return count

    def idle_experts(self) -> list[str]:
        """Names of the experts that no token was sent to, as they appear in parameter names."""
        idle = (self.counts.sum(dim=1) == 0).nonzero().tolist()
        return [f"{self.blocks[layer]}.experts.{expert}." for layer, expert in idle]

    def take(self) -> dict[str, float]:
        """What was counted since the last call, over all processes, as flat metrics; resets the counts.

        `router/entropy` is the mean over layers of the entropy of expert use, 1.0 when even; `router/entropy_ar` and
        `_en` likewise; `router/expert_N` is the share of all assignments that expert N got.
        """
        counts = self.counts.clone()
        self.counts.zero_()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if not counts.sum():
            return {}
        shares = counts.sum(dim=(0, 1)) / counts.sum()
        metrics = {f"router/expert_{index}": round(float(share), 4) for index, share in enumerate(shares)}
        metrics["router/entropy"] = _entropy(counts.sum(dim=1))
        for index, language in enumerate(LANGUAGES):
            if counts[:, index].sum():
                metrics[f"router/entropy_{language}"] = _entropy(counts[:, index])
        return metrics


def _entropy(counts: torch.Tensor) -> float:
    """(layers, experts) to the mean over layers of the entropy divided by that of an even spread."""
    shares = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1)
    return round(float(entropy.mean()) / math.log(counts.shape[-1]), 4)
