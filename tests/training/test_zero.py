"""DeepSpeed ZeRO on two CPU processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from training.recipe import Recipe
from training.tune import run


def two_processes(recipe: Recipe, config: Path) -> dict[str, Any]:
    """The summary of a run under torchrun."""
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "training.cli", "tune", str(config), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    summary: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return summary


def losses(recipe: Recipe) -> list[float]:
    lines = (recipe.output / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize(("stage", "quantization"), [(2, "none"), (3, "nf4")])
def test_zero_trains_as_one_process_does(make_recipe: Any, tmp_path: Path, stage: int, quantization: str) -> None:
    """The same rows give the same losses, up to the bf16 adapter that DeepSpeed works with."""
    settings = {"quantization": quantization, "gradient_checkpointing": True, "data": {"max_length": 256}}
    alone = make_recipe(output=str(tmp_path / "alone"), **settings)
    shared = make_recipe(output=str(tmp_path / "shared"), zero=stage, gpus=2, **settings)
    run(alone)
    summary = two_processes(shared, tmp_path / "shared.yaml")
    assert losses(shared) == pytest.approx(losses(alone), abs=0.03)
    one, other = (load_file(r.output / "adapter" / "adapter_model.safetensors") for r in (alone, shared))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    assert sum(tensor.numel() for tensor in other.values()) == summary["trainable_parameters"]
