from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training.errors import Refused
from training.mixtral import UnfusedMixtralConfig
from training.plan import make_plan
from training.recipe import read_recipe

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
MIXTRAL_8X7B = UnfusedMixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path) -> None:
    read_recipe(path)


def test_the_papers_run() -> None:
    recipe = read_recipe(CONFIGS / "bimedix.yaml")
    assert (recipe.quantization, recipe.lora.rank, recipe.lora.alpha) == ("nf4", 128, 64)
    assert (recipe.optimiser.learning_rate, recipe.optimiser.warmup_steps, recipe.optimiser.epochs) == (2e-4, 10, 2)
    assert recipe.optimiser.effective_batch == 16
    assert recipe.accumulation(8) == 2
    assert recipe.gradient_checkpointing
    assert recipe.zero


def test_the_papers_plan() -> None:
    plan = make_plan(read_recipe(CONFIGS / "bimedix.yaml"), MIXTRAL_8X7B)
    assert plan.base_parameters == 46_702_792_704
    assert plan.trainable_parameters == 1_904_246_784
    assert "4.08% of the base" in plan.table()
    assert plan.total < 80 * 2**30
    assert plan.quantised_parameters > 0.99 * plan.base_parameters


def changed(tmp_path: Path, **changes: Any) -> Path:
    settings = yaml.safe_load((CONFIGS / "bimedix.yaml").read_text())
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: Extra inputs"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout: Extra inputs"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"gpus": 3}, "16 is not a multiple of 3"),
        ({"gpus": 1}, "ZeRO partitions"),
        ({"zero": 1}, "zero"),
        ({"quantization": "int8"}, "quantization"),
        ({"data": {"train": []}}, "data.train"),
        ({"optimiser": {"learning_rate": 1.0}}, "optimiser.learning_rate"),
    ],
)
def test_a_bad_config_is_refused_before_anything_loads(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_recipe(changed(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[]", "a: [", ""])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(Refused):
        read_recipe(tmp_path / "a.yaml")


def test_missing_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not exist"):
        read_recipe(changed(tmp_path, base="/no/such/base")).check_inputs()
    with pytest.raises(Refused, match="bimed1.3m does not exist"):
        read_recipe(changed(tmp_path)).check_inputs()


def test_the_digest_is_of_what_decides_the_result(tmp_path: Path) -> None:
    recipe = read_recipe(CONFIGS / "bimedix.yaml")
    assert read_recipe(changed(tmp_path, output="elsewhere")).digest == recipe.digest
    assert read_recipe(changed(tmp_path, seed=1)).digest != recipe.digest
