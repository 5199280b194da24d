from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.conftest import EMBEDDED
from training.mixtral import TopK, load
from training.router import Balance, token_languages
from training.rows import vicuna_tokenizer

TOKENIZER = vicuna_tokenizer(EMBEDDED)


def languages(text: str) -> set[int]:
    return set(token_languages(TOKENIZER)[TOKENIZER(text, add_special_tokens=False)["input_ids"]].tolist())


def test_tokens_belong_to_the_language_of_their_script() -> None:
    assert languages("fever and headache") == {0}
    assert languages("حمى وصداع") == {1}
    assert languages("12 . ؟") == {2}


def test_all_tokens_are_counted_by_language_while_training(base: Path) -> None:
    model = load(base, dtype=torch.float32).train()
    balance = Balance(model, TOKENIZER)
    ids = TOKENIZER("fever حمى 12", return_tensors="pt", add_special_tokens=False)["input_ids"]
    model(input_ids=ids)
    assert balance.counts.sum(dim=(1, 2)).tolist() == [2 * ids.numel()] * 2
    scripts = token_languages(TOKENIZER)[ids].flatten()
    assert balance.counts[0].sum(dim=1).tolist() == [2 * int((scripts == index).sum()) for index in range(3)]
    model.eval()
    model(input_ids=ids)
    assert balance.counts[0].sum() == 2 * ids.numel()
    assert 0 < balance.take()["router/entropy"] <= 1
    assert balance.take() == {}


def test_a_router_that_sends_everything_to_two_experts(base: Path) -> None:
    model = load(base, dtype=torch.float32).train()
    for name, module in model.named_modules():
        if isinstance(module, TopK):
            gate = model.get_submodule(name.replace(".top_k", ".gate"))
            gate.register_forward_hook(lambda *_: torch.tensor([[5.0, 5.0, 0, 0]]).expand(8, 4))
    balance = Balance(model, TOKENIZER)
    model(input_ids=torch.full((1, 8), 900))
    assert balance.idle_experts() == [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}." for layer in (0, 1) for expert in (2, 3)
    ]
    metrics = balance.take()
    assert metrics["router/entropy"] == pytest.approx(0.5)
    assert (metrics["router/expert_0"], metrics["router/expert_3"]) == (0.5, 0.0)
