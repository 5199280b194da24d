"""`bimedix checkpoints activate` and its like, against a running service."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from tests.server.checkpoints.conftest import ADMIN, BASE, TWIN, Administered


def call(service: Administered, *arguments: str, key: str = ADMIN) -> Result:
    command = ["checkpoints", *arguments, "--url", service.url]
    return CliRunner().invoke(app, command, env={"BIMEDIX_ADMIN_KEY": key})


def test_activate_and_look(administered: Administered) -> None:
    administered.serve(BASE)
    done = call(administered, "activate", TWIN)
    assert done.exit_code == 0, done.output
    for phase in ("verify", "drain", "reload", "gate", "commit"):
        assert phase in done.stdout
    report = json.loads(call(administered, "activate", TWIN, "--json").stdout.splitlines()[-1])
    assert (report["result"], report["serving"]) == ("unchanged", TWIN)
    assert TWIN in call(administered, "status").stdout
    assert json.loads(call(administered, "status", "--json").stdout)["desired"] == TWIN
    assert f"activate {TWIN}  activated" in call(administered, "audit").stdout
    assert json.loads(call(administered, "audit", "--limit", "1", "--json").stdout)[0]["result"] == "unchanged"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["activate", "nothing"], "no such checkpoint"),
        (["activate", TWIN, "--share", "0.5"], "second replica"),
        (["promote"], "no canary"),
        (["abort"], "no canary"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(administered: Administered, arguments: list[str], reason: str) -> None:
    administered.serve(BASE)
    ended = call(administered, *arguments)
    assert ended.exit_code == 1
    assert reason in ended.output and "Traceback" not in ended.output


def test_a_wrong_key_or_no_service_ends_in_one_line(administered: Administered) -> None:
    refused = call(administered, "status", key="wrong")
    assert refused.exit_code == 1 and "admin key" in refused.output
    nobody = CliRunner().invoke(app, ["checkpoints", "status", "--url", "http://127.0.0.1:9"])
    assert nobody.exit_code == 1 and "no answer" in nobody.output


def test_what_did_not_pass_ends_in_failure(administered: Administered) -> None:
    ended = call(administered, "activate", "noise")
    assert ended.exit_code == 1
    assert "rolled_back" in ended.stdout
