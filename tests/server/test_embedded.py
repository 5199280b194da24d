"""The embedded checkpoint is what its manifest says, small, safe, and a real Mixtral."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from server.checkpoints.manifest import FILE, read_manifest, sha256
from server.settings import EMBEDDED_CHECKPOINT

TEMPLATE_OF_TRAINING = Path(__file__).parents[2] / "training" / "vicuna_v1.1.jinja"


def test_manifest_lists_every_file_with_its_digest() -> None:
    manifest = read_manifest(EMBEDDED_CHECKPOINT)
    assert manifest is not None
    found = {path.name: sha256(path) for path in EMBEDDED_CHECKPOINT.iterdir() if path.name != FILE}
    assert manifest.files == found


def test_it_is_small_and_holds_no_code() -> None:
    files = list(EMBEDDED_CHECKPOINT.iterdir())
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}


def test_it_is_a_mixtral_with_eight_experts_of_which_two_see_each_token() -> None:
    config = json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    with safe_open(EMBEDDED_CHECKPOINT / "model.safetensors", "np") as weights:
        experts = {name.split(".")[5] for name in weights.keys() if ".experts." in name}  # noqa: SIM118
    assert experts == {str(number) for number in range(8)}


def test_its_template_is_the_one_that_training_uses() -> None:
    template = (EMBEDDED_CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8")
    assert template.strip() == TEMPLATE_OF_TRAINING.read_text(encoding="utf-8").strip()
