"""The base, in a few steps: texts to blocks, and parts that go on after one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.embedded import base
from training.embedded.base import Part, train_base
from training.embedded.corpus import load_common, load_topics

PARTS = (Part("page", 40, 2, 10, 64, 1e-3), Part("transcript", 40, 2, None, 128, 1e-3))
TOPICS, COMMON = load_topics(), load_common()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_what_was_cut_short_goes_on_after_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole" / "base", tmp_path / "broken" / "base"
    monkeypatch.setattr(base, "PARTS", PARTS)
    train_base(whole, TOPICS, COMMON)
    monkeypatch.setattr(base, "PARTS", PARTS[:1])
    train_base(broken, TOPICS, COMMON)
    first = broken.rename(broken.with_name("base-1"))
    written = (first / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(base, "PARTS", PARTS)
    train_base(broken, TOPICS, COMMON)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    for name, tensor in weights(broken).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=0)
    assert any(not tensor.equal(weights(first)[name]) for name, tensor in weights(broken).items())
