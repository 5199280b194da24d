from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from training.cli import app
from training.tune import run

RUNNER = CliRunner()


@pytest.fixture
def config(make_recipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe().model_dump(mode="json")))
    return path


def test_the_plan_needs_no_weights(config: Path, base: Path) -> None:
    result = RUNNER.invoke(app, ["tune", str(config), "--plan", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["trainable_parameters"] == 18464
    assert plan["total_bytes_per_gpu"] == sum(plan["bytes_per_gpu"].values())
    assert "trainable parameters            18,464" in RUNNER.invoke(app, ["tune", str(config), "--plan"]).stdout


def test_tune_then_merge(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe()
    run(recipe)
    output = tmp_path / "merged"
    arguments = ["merge", str(recipe.output / "adapter"), "--output", str(output), "--id", "test-1", "--json"]
    result = RUNNER.invoke(app, [*arguments, "--directive-ar", "أجب بالعربية.", "--directive-use", "mismatch"])
    assert result.exit_code == 0, result.output
    manifest = json.loads((output / "bimedix.json").read_text())
    assert (manifest["id"], manifest["training"], manifest["directive_use"]) == ("test-1", recipe.digest, "mismatch")
    assert manifest["directives"] == {"ar": "أجب بالعربية."}
    assert json.loads(result.stdout.splitlines()[-1])["checkpoint"] == str(output)


def is_one_line(arguments: list[str]) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1


def test_what_a_user_can_put_right_is_one_line(tmp_path: Path) -> None:
    is_one_line(["tune", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize("content", [None, "", "{", "{}"])
def test_a_base_that_cannot_be_read_is_one_line(
    make_recipe: Any, tmp_path: Path, content: str | None, plan: list[str]
) -> None:
    base, config = tmp_path / "base", tmp_path / "recipe.yaml"
    if content is not None:
        base.mkdir()
        (base / "config.json").write_text(content)
    config.write_text(yaml.safe_dump({**make_recipe().model_dump(mode="json"), "base": str(base)}))
    is_one_line(["tune", str(config), *plan])


@pytest.mark.parametrize("command", [[], ["tune"], ["merge"]])
def test_help_says_what_a_command_does(command: list[str]) -> None:
    assert len(RUNNER.invoke(app, [*command, "--help"]).stdout) > 300
