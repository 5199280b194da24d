from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

import training.tune
from training.progress import Journal
from training.proofs import ProofFailed
from training.recipe import Recipe
from training.rows import prepare, vicuna_tokenizer
from training.tune import Tuner, adapt, base_model, last_checkpoint, run, summed_loss, training_arguments

LEARNS = {"optimiser": {"learning_rate": 1e-2, "epochs": 6}, "lora": {"rank": 16, "alpha": 32}}


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.output / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in metrics(recipe) if "loss" in entry}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tuning_learns_and_writes_an_adapter(make_recipe: Any, quantization: str) -> None:
    recipe = make_recipe(quantization=quantization, **LEARNS)
    summary = run(recipe)
    assert summary["held_out_loss"] < 7 < losses(recipe)[1]
    logged = metrics(recipe)[1]
    assert {"tokens_per_second", "router/entropy", "router/entropy_ar", "router/expert_0"} <= logged.keys()
    assert 0 < logged["router/entropy_ar"] <= 1
    assert sum(logged[f"router/expert_{index}"] for index in range(4)) == pytest.approx(1, abs=0.001)
    adapter = recipe.output / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == summary["trainable_parameters"]
    assert json.loads((adapter / "bimedix_adapter.json").read_text())["training"] == recipe.digest
    assert (recipe.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(recipe.output.rglob("events.out.tfevents*"))


def test_gradient_checkpointing_changes_nothing(make_recipe: Any, tmp_path: Path) -> None:
    plain, checkpointed = (
        make_recipe(output=str(tmp_path / str(flag)), gradient_checkpointing=flag) for flag in (False, True)
    )
    run(plain)
    run(checkpointed)
    assert losses(plain) == pytest.approx(losses(checkpointed), abs=1e-5)


def test_a_run_that_was_killed_resumes_exactly(make_recipe: Any, tmp_path: Path) -> None:
    unbroken, broken = (make_recipe(output=str(tmp_path / name)) for name in ("unbroken", "broken"))
    run(unbroken)
    config = tmp_path / "broken.yaml"
    config.write_text(yaml.safe_dump(broken.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "training.cli", "tune", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    journal = broken.output / "metrics.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 3) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(broken)) < len(losses(unbroken)), "it ended before it was killed"
    checkpoint = last_checkpoint(broken.output)
    assert checkpoint is not None
    # A checkpoint that was being written when the process died.
    (broken.output / "checkpoint-999").mkdir()
    run(broken, resume=True)
    assert losses(broken) == losses(unbroken)
    one, other = (load_file(r.output / "adapter" / "adapter_model.safetensors") for r in (unbroken, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_output_is_not_overwritten(make_recipe: Any) -> None:
    recipe = make_recipe()
    run(recipe)
    with pytest.raises(FileExistsError, match="--resume"):
        run(recipe)
    with pytest.raises(FileExistsError, match="another recipe"):
        run(make_recipe(seed=1), resume=True)


def tuner(recipe: Recipe, rows: Dataset | None = None) -> Tuner:
    tokenizer = vicuna_tokenizer(recipe.base)
    train, held_out, _ = prepare(recipe, tokenizer, recipe.output / "data")
    journal = Journal(recipe.output / "metrics.jsonl", main=True)
    model = adapt(base_model(recipe, torch.float32), recipe)
    return Tuner(model, training_arguments(recipe, 1), train if rows is None else rows, held_out, tokenizer, journal)


def test_an_adapter_tensor_without_a_gradient_stops_the_first_step(make_recipe: Any) -> None:
    trainer = tuner(make_recipe())
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.block_sparse_moe.experts.2.w2")
    layer.forward = layer.base_layer.forward
    with pytest.raises(ProofFailed, match=r"2 adapter tensors got no gradient, first .*layers.1.*experts.2.w2"):
        trainer.train()


def test_an_adapter_tensor_with_a_zero_gradient_stops_the_first_step(make_recipe: Any) -> None:
    trainer = tuner(make_recipe())
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    torch.nn.init.zeros_(layer.lora_A["default"].weight)
    with pytest.raises(ProofFailed, match=r"1 adapter tensors got a zero gradient, first .*v_proj.lora_B"):
        trainer.train()


def test_labels_that_are_not_the_tokens_stop_the_first_step(make_recipe: Any) -> None:
    ids = list(range(300, 340))
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids[::-1], "seq_lengths": [40]}] * 8)
    with pytest.raises(ProofFailed, match="labels differ"):
        tuner(make_recipe(), rows).train()


def test_a_loss_on_masked_positions_stops_the_first_step(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def everywhere(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return summed_loss(model, {**inputs, "labels": inputs["input_ids"]})

    monkeypatch.setattr(training.tune, "summed_loss", everywhere)
    with pytest.raises(ProofFailed, match="outside the assistant's turns"):
        tuner(make_recipe()).train()


def test_replies_without_an_end_stop_the_first_step(make_recipe: Any) -> None:
    ids = list(range(300, 340))
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids, "seq_lengths": [40]}] * 8)
    with pytest.raises(ProofFailed, match="end of a reply"):
        tuner(make_recipe(), rows).train()
