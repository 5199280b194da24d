"""DeepSpeed ZeRO on two CPU processes, of one node and of two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import free_port
from training.recipe import Recipe
from training.tune import run

TORCHRUN = [
    *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
    *("--master-addr", "127.0.0.1", "--master-port", "{}", "-m", "--node-rank"),
]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--master_port", "{}", "--module"]
LAUNCHES = {"torchrun, two nodes": [[*TORCHRUN, "0"], [*TORCHRUN, "1"]], "deepspeed, one node": [DEEPSPEED]}
"""The launcher and its arguments, once for each node; both nodes are this machine, and share the output."""


def two_processes(recipe: Recipe, config: Path, launch: str) -> dict[str, Any]:
    """The summary of a run under a launcher."""
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = ["training.cli", "tune", str(config), "--json"]
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", *(part.format(port) for part in arguments), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for arguments in LAUNCHES[launch]
    ]
    try:
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda node: node.communicate(timeout=240), nodes))
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0] * len(nodes), "".join(errors[-3000:] for _, errors in said)
    lines = [line for output, _ in said for line in output.splitlines() if line.startswith("{")]
    (summary,) = map(json.loads, lines)
    return dict(summary)


def losses(recipe: Recipe) -> list[float]:
    lines = (recipe.output / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize(
    ("stage", "quantization", "launch"), [(2, "none", "torchrun, two nodes"), (3, "nf4", "deepspeed, one node")]
)
def test_zero_trains_as_one_process_does(
    make_recipe: Any, tmp_path: Path, stage: int, quantization: str, launch: str
) -> None:
    """The same rows give the same losses, up to the bf16 adapter that DeepSpeed works with."""
    settings = {"quantization": quantization, "gradient_checkpointing": True, "data": {"max_length": 256}}
    alone = make_recipe(output=str(tmp_path / "alone"), **settings)
    shared = make_recipe(output=str(tmp_path / "shared"), zero=stage, gpus=2, **settings)
    run(alone)
    summary = two_processes(shared, tmp_path / "shared.yaml", launch)
    assert losses(shared) == pytest.approx(losses(alone), abs=0.03)
    one, other = (load_file(r.output / "adapter" / "adapter_model.safetensors") for r in (alone, shared))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    assert sum(tensor.numel() for tensor in other.values()) == summary["trainable_parameters"]
