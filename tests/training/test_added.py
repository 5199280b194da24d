"""An adapter's way into the service's registry: merged, verified, and under its id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from server.checkpoints.manifest import read_manifest
from server.checkpoints.registry import Registry
from server.checkpoints.verify import verify
from server.cli import app
from tests.training.test_merge import lora, randomised
from training.manifest import Manifest, digests
from training.mixtral import load


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a manifest, as a service has it."""
    directory = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(base, directory)
    Manifest(
        id="base-1",
        base="random",
        description="Random weights.",
        adapter=None,
        training=None,
        files=digests(directory),
        directives={"ar": "أجب بالعربية."},
        directive_use="mismatch",
    ).write(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "adapter"
    randomised(get_peft_model(load(served, dtype=torch.float32), lora()), directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread_in_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_an_adapter_is_merged_verified_and_added(served: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["checkpoints", "add", str(adapter), "--base", str(served), "--id", "tuned-1", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--checkpoints", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["id"] == "tuned-1"
    added = Registry(tmp_path).get("tuned-1")
    verify(added, served)
    assert added.manifest.directives == {"ar": "أجب بالعربية."}
    assert added.manifest.directive_use == "mismatch"
    assert added.manifest == read_manifest(tmp_path / "tuned-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "tuned-1"]


def test_a_merge_that_fails_adds_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["checkpoints", "add", str(adapter), "--checkpoints", str(tmp_path / "registry")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"{adapter} was not merged: ImportError: this torch is broken" in result.stderr
    assert [path.name for path in (tmp_path / "registry").iterdir()] == [".lock"]
