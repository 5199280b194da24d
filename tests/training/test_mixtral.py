from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from training.errors import Refused
from training.mixtral import ADAPTED, UnfusedMixtral, adapter_parameters, load, unfused_config
from training.proofs import ProofFailed, adapter_is_complete, experts_are_4bit
from training.recipe import Recipe
from training.tune import adapt, base_model

IDS = torch.randint(3, 6000, (2, 24), generator=torch.Generator().manual_seed(1))


def fused(base: Path) -> MixtralForCausalLM:
    model: MixtralForCausalLM = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def quantised(make_recipe: Any) -> tuple[UnfusedMixtral, Recipe]:
    recipe: Recipe = make_recipe(quantization="nf4")
    return base_model(recipe, torch.bfloat16), recipe


@torch.inference_mode()
def test_logits_equal_the_fused_models(base: Path) -> None:
    ours = load(base, dtype=torch.float32).eval()
    torch.testing.assert_close(ours(IDS).logits, fused(base)(IDS).logits, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_loss_and_router_logits_equal_the_fused_models(base: Path) -> None:
    ours, theirs = (
        model(IDS, labels=IDS, output_router_logits=True)
        for model in (load(base, dtype=torch.float32).eval(), fused(base))
    )
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    for one, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_greedy_tokens_equal_the_fused_models(base: Path) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = load(base, dtype=torch.float32).eval().generate(IDS[:1], **options)
    assert ours.tolist() == fused(base).generate(IDS[:1], **options).tolist()


def test_4_bit_reaches_every_expert(quantised: tuple[UnfusedMixtral, Recipe]) -> None:
    model, _ = quantised
    assert experts_are_4bit(model) == 2 * 4 * 3
    assert model.get_parameter("model.layers.0.block_sparse_moe.gate.weight").dtype == torch.bfloat16


def test_a_model_left_in_16_bits_is_refused(make_recipe: Any) -> None:
    with pytest.raises(ProofFailed, match="is not NF4"):
        experts_are_4bit(base_model(make_recipe(), torch.bfloat16))


def test_4_bit_left_to_transformers_skips_the_experts(base: Path) -> None:
    """Why the experts are unfused: should this fail, the library has learnt to quantise them (bitsandbytes#1849)."""
    from transformers import BitsAndBytesConfig

    model = MixtralForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    with pytest.raises(ProofFailed, match="no expert matrix"):
        experts_are_4bit(model)


def test_every_adapter_tensor_gets_a_gradient(quantised: tuple[UnfusedMixtral, Recipe]) -> None:
    model, recipe = quantised
    model = adapt(model, recipe)
    trainable = adapter_is_complete(model, unfused_config(recipe.base), recipe.lora.rank)
    assert trainable == adapter_parameters(unfused_config(recipe.base), 4)
    for _ in range(2):  # a second pass crashes where the 4-bit experts are parametrised
        model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * (3 + 4 * 3 + 1)
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool(g.any()) for name, g in gradients.items() if "lora_B" in name and g is not None)


def test_an_incomplete_adapter_is_refused(base: Path) -> None:
    """Under `model_type: mixtral` an adapter on the fused model has other parameters than the recipe's."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ProofFailed, match="parameters are trainable"):
        adapter_is_complete(get_peft_model(fused(base), lora), unfused_config(base), 4)


def test_an_expert_without_tokens_still_gets_a_gradient(base: Path) -> None:
    model = get_peft_model(load(base, dtype=torch.float32), LoraConfig(r=4, target_modules=list(ADAPTED)))
    model(IDS[:1, :1]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def edited(base: Path, tmp_path: Path, change: Any) -> Path:
    copy = tmp_path / "edited"
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(EXPERT),
        lambda tensors: tensors.update(surplus=torch.zeros(1)),
    ],
    ids=["missing", "surplus"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(base: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(Refused, match="does not fit Mixtral"):
        load(edited(base, tmp_path, change), dtype=torch.float32)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(Refused, match="'llama'"):
        unfused_config(tmp_path)
