"""`bimedix language score` on a file, and what it says of a bad one."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from server.language.cli import app
from server.language.trial import REPLIES, cases


def test_score_prints_rates_and_one_json_line(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    records = [{"expected": "ar", "reply": REPLIES["ar"]}, {"expected": "ar", "reply": REPLIES["en"]}]
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    result = CliRunner().invoke(app, ["score", str(file), "--json"])
    assert result.exit_code == 0
    rates = json.loads(result.stdout.splitlines()[-1])
    assert (rates["ar"]["line_level"], rates["ar"]["judged"], rates["en"]["judged"]) == (0.5, 2, 0)
    assert "50.0%" in result.stdout


def test_score_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    file.write_text('{"expected": "fr", "reply": ""}\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["score", str(file)])
    assert result.exit_code == 2
    assert f"{file}:1" in result.stderr


def test_the_trial_pulls_every_conversation_the_other_way() -> None:
    for expected in ("en", "ar"):
        found = list(cases(expected))  # type: ignore[arg-type]
        assert len(found) >= 200
        assert all(case.expected == expected for case in found)
        assert sum(len(case.messages) > 1 and case.language == "auto" for case in found) == len(found) / 3
        assert all(case.language == expected for case in found if len(case.messages) == 1)
