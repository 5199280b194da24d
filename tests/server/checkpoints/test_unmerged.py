"""What is read of an adapter before vLLM sees it, and what `--adapter` says where vLLM can't apply one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from server.checkpoints.architecture import expected_tensors
from server.checkpoints.unmerged import parse_entries, read_unmerged
from server.settings import EMBEDDED_CHECKPOINT, Settings
from tests.server.checkpoints.lora import RANK, make_adapter

EXPECTED = expected_tensors(json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text(encoding="utf-8")))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", 1)


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def configure(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_each_content_has_a_name_of_its_own(adapter: Path) -> None:
    one = read_unmerged("cardio", adapter)
    first = one.revision(one.verify(EXPECTED))
    assert (one.rank, one.adapts_experts) == (RANK, False)
    make_adapter(adapter, 2)
    two = read_unmerged("cardio", adapter)
    assert first != two.revision(two.verify(EXPECTED))
    assert first.startswith("cardio@")


def test_adapters_of_experts_are_known(tmp_path: Path) -> None:
    assert read_unmerged("cardio", make_adapter(tmp_path, 1, ("q_proj", "w1", "w2", "w3"))).adapts_experts


@pytest.mark.parametrize("entry", ["", "cardio", "=x", "cardio=", "../x=.", "a b=.", "a=1,a@b=2"])
def test_entries_of_another_form_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="--adapter"):
        parse_entries(entry.split(","))


def test_names_do_not_repeat() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_entries(["a=x", "a=y"])


def link(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.symlink_to(weights.rename(adapter / "elsewhere.safetensors"))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda a: (a / "adapter_config.json").unlink(), "not there as a file of its own"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "not there as a file of its own"),
    "truncated": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 5), "truncated"),
    "a pickle": (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "not there as a file"),
    "a link": (link, "file of its own"),
    "not json": (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "another method": (lambda a: configure(a, peft_type="IA3"), "not a LoRA adapter"),
    "no rank": (lambda a: configure(a, r="8"), "gives no rank"),
    "another rank": (lambda a: configure(a, r=4), "of rank 8, and adapter_config.json says 4"),
    "half a pair": (lambda a: edit(a, lambda t: t.pop(FIRST)), "no pair"),
    "two ranks": (lambda a: edit(a, lambda t: t.update({FIRST: torch.zeros(4, 256)})), "differ in rank"),
    "a bias": (lambda a: edit(a, lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(4)})), "not a LoRA"),
    "empty": (lambda a: edit(a, lambda t: t.clear()), "adapts nothing"),
    "another model's": (
        lambda a: edit(a, lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items()})),
        "does not have",
    ),
    "another width": (lambda a: edit(a, lambda t: t.update({FIRST: torch.zeros(8, 128)})), "the model's is"),
    "not a number": (lambda a: edit(a, lambda t: t.update({FIRST: torch.full((8, 256), torch.nan)})), "NaN"),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_what_does_not_fit_is_refused(what: str, adapter: Path) -> None:
    breakage, reason = BREAKAGES[what]
    breakage(adapter)
    with pytest.raises(ValueError, match=reason):
        read_unmerged("cardio", adapter).verify(EXPECTED)


def test_adapters_and_activations_exclude_each_other(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="without --checkpoints"):
        Settings(adapters=f"a={adapter}", checkpoints=tmp_path)


def test_without_triton_the_flag_says_what_to_do(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, 1, ("w1", "w2", "w3"))
    command = [sys.executable, "-m", "server.cli", "serve", "--adapter", f"cardio={adapter}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 2
    assert "Triton" in ended.stderr
    assert "bimedix-train merge" in ended.stderr and "bimedix checkpoints add" in ended.stderr
