"""`bimedix checkpoints` on a registry, without a service."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.checkpoints.deployment import Deployment
from server.checkpoints.manifest import FILE
from server.cli import app
from server.conversations.database import Database
from tests.server.checkpoints.small import SHARD, change, make_checkpoint, sign


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry, and a store that no service has made yet."""
    root = tmp_path / "registry"
    root.mkdir()
    monkeypatch.setenv("BIMEDIX_CHECKPOINTS", str(root))
    monkeypatch.setenv("BIMEDIX_STORE", f"sqlite:///{tmp_path / 'store.db'}")
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "small")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


def last_line(result: Result) -> Any:
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def test_from_adding_to_removing(registry: Path, small: Path) -> None:
    assert "There is no checkpoint in" in run("list").stdout
    added = run("add", small, "--json")
    assert added.exit_code == 0
    assert [line.split(": ")[0] for line in added.stderr.splitlines()] == ["copying", "verifying"]
    assert last_line(added)["path"] == str(registry / "small-1")
    assert run("list").stdout.startswith("small-1  20")
    (only,) = last_line(run("list", "--json"))["checkpoints"]
    assert only == last_line(run("show", "small-1", "--json")) == last_line(added)
    assert SHARD in run("show", "small-1").stdout
    assert "small-1 is what its manifest says: " in run("verify", "small-1").stdout
    assert last_line(run("verify", "small-1", "--json"))["problems"] == []
    assert run("remove", "small-1").exit_code == 1, "nobody said that it is not in use"
    assert run("remove", "small-1", "--yes").stdout == "small-1 is removed.\n"
    assert os.listdir(registry / ".removed") == ["small-1"]
    assert last_line(run("list", "--json")) == {"checkpoints": [], "unusable": []}


async def deploy(url: str, desired: str, previous: str, running: str) -> None:
    """What a service leaves in the store."""
    database = Database(url)
    deployment = Deployment(database)
    token = await deployment.take("a test", "activate")
    await deployment.want(token, desired, previous)
    await deployment.beat("replica-1", running, "serving", None, "")
    await deployment.release(token)
    await database.dispose()


def test_what_the_store_says_is_in_use_stays(registry: Path, tmp_path: Path) -> None:
    for number in range(1, 5):
        run("add", make_checkpoint(tmp_path / str(number), f"small-{number}", seed=number))
    asyncio.run(deploy(os.environ["BIMEDIX_STORE"], "small-1", "small-2", "small-3"))
    for number in (1, 2, 3):
        result = run("remove", f"small-{number}")
        assert (result.exit_code, "activate another first" in result.stderr) == (1, True)
    assert run("remove", "small-4").exit_code == 0
    assert [each["id"] for each in last_line(run("list", "--json"))["checkpoints"]] == ["small-1", "small-2", "small-3"]


async def audited(url: str) -> list[tuple[str, str, str]]:
    """What was done to what and with which result, the newest last."""
    database = Database(url)
    log = await Deployment(database).audit(10, None)
    await database.dispose()
    assert all(one["who"].endswith(" (terminal)") for one in log)
    return [(one["what"], one["checkpoint"], one["result"]) for one in reversed(log)]


def test_what_is_done_at_the_terminal_is_audited(registry: Path, small: Path) -> None:
    asyncio.run(deploy(os.environ["BIMEDIX_STORE"], "other-1", "other-2", "other-1"))
    run("add", small)
    run("add", make_checkpoint(small.parent / "changed", "small-1", seed=9))
    run("remove", "small-1")
    assert asyncio.run(audited(os.environ["BIMEDIX_STORE"])) == [
        ("add", "small", "done"),
        ("add", "changed", "refused"),
        ("remove", "small-1", "done"),
    ]


def test_nothing_is_removed_while_an_activation_runs(registry: Path, small: Path) -> None:
    """It says who is at it."""

    async def hold() -> None:
        database = Database(os.environ["BIMEDIX_STORE"])
        await Deployment(database).take("replica-1", "activate small-1")
        await database.dispose()

    run("add", small)
    asyncio.run(hold())
    result = run("remove", "small-1")
    assert (result.exit_code, result.stderr) == (1, "replica-1 is at it: activate small-1\n")
    assert (registry / "small-1").is_dir()


def test_a_store_that_is_away(registry: Path, small: Path) -> None:
    run("add", small)
    away = ("--store", "postgresql://nobody@127.0.0.1:1/none")
    for action in (("remove", "small-1"), ("add", small)):
        result = run(*action, *away)
        assert (result.exit_code, "store is unavailable" in result.stderr) == (1, True)
    assert run("remove", "small-1", "--store", "nonsense").exit_code == 2
    assert (registry / "small-1").is_dir()


def test_a_directory_is_verified_without_a_registry(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIMEDIX_CHECKPOINTS", raising=False)
    assert run("verify", small).exit_code == 0
    assert run("verify", small, "--serving", small).exit_code == 0
    result = run("list")
    assert (result.exit_code, "--checkpoints" in result.stderr) == (2, True)


def test_every_problem_is_a_line(small: Path) -> None:
    (small / "model.bin").touch()
    change(small / "config.json", auto_map={})
    result = run("verify", small, "--json")
    assert result.exit_code == 1
    assert len(last_line(result)["problems"]) == 4
    lines = result.stderr.splitlines()
    assert lines[-5] == "Checkpoint small-1 is refused:"
    assert [line[:2] for line in lines[-4:]] == ["- "] * 4


def test_another_tokenizer_is_no_swap(small: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "small-2")
    change(other / "tokenizer.json", version="2.0")
    result = run("verify", sign(other), "--serving", small)
    assert (result.exit_code, "start new replicas with this checkpoint" in result.stderr) == (1, True)


def test_a_broken_checkpoint_hides_no_other(registry: Path, small: Path) -> None:
    run("add", small)
    (registry / "broken").mkdir()
    listed = run("list")
    assert listed.exit_code == 0
    assert "broken   cannot be used: see `bimedix checkpoints show broken`" in listed.stdout
    shown = run("show", "broken")
    assert (shown.exit_code, f"has no manifest {FILE}" in shown.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["show", "small-9"], 1, "there is no checkpoint small-9"),
        (["show", "../x"], 1, "is no checkpoint id"),
        (["verify", "small-9"], 2, "neither in the registry nor a directory"),
        (["remove", "small-9", "--yes"], 1, "there is no checkpoint small-9"),
        (["add", "no-such-directory"], 2, "does not exist"),
    ],
)
def test_what_is_asked_wrongly(registry: Path, arguments: list[str], code: int, reason: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, reason in " ".join(result.stderr.split())) == (code, True), result.stderr


def test_merging_is_for_adapters(registry: Path, small: Path) -> None:
    result = run("add", small, "--base", "somewhere")
    assert (result.exit_code, "--base and --id are for merging" in result.stderr) == (2, True)


def test_merging_without_the_tools_for_it(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)  # As Python has it where it is not installed.
    result = run("add", tmp_path)
    assert result.exit_code == 1
    assert "install bimedix[train], or run `bimedix-train merge" in result.stderr
    assert [path.name for path in registry.iterdir()] == [".lock"]
