"""`--adapter`: what is read of adapters, and what a machine that can't apply them says. Applying them needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.checkpoints.unmerged import read_unmerged
from server.settings import Settings


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 128}))
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    return folder


def test_each_content_has_a_name_of_its_own(adapter: Path) -> None:
    (one,) = read_unmerged([f"cardio={adapter}"])
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    (two,) = read_unmerged([f"cardio={adapter}"])
    assert (one.name, one.rank) == ("cardio", 128)
    assert one.revision != two.revision
    assert one.revision.startswith("cardio@")


@pytest.mark.parametrize("entry", ["", "cardio", "=x", "../x=.", "a b=.", "cardio=/no/such/directory"])
def test_what_is_no_adapter_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="--adapter"):
        read_unmerged([entry])


def test_names_do_not_repeat(adapter: Path) -> None:
    with pytest.raises(ValueError, match="repeat"):
        read_unmerged([f"a={adapter}", f"a={adapter}"])


def test_adapters_and_activations_exclude_each_other(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="without --checkpoints"):
        Settings(adapters=f"a={adapter}", checkpoints=tmp_path)


def test_without_triton_the_flag_says_what_to_do(adapter: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--adapter", f"cardio={adapter}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 2
    assert "Triton" in ended.stderr
    assert "bimedix-train merge" in ended.stderr and "bimedix checkpoints add" in ended.stderr
