"""`bimedix latency` at a terminal, on the real service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.latency.cli import app
from tests.conftest import RunningService

SMALL = ["--reply-tokens", "8", "--prompt-words", "20", "--json"]


def latency(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("mode", ["closed", "open", "conversations"])
def test_a_run_measures_the_service_and_writes_its_report(service: RunningService, tmp_path: Path, mode: str) -> None:
    load = {
        "closed": ["--concurrency", "2", "--requests", "6"],
        "open": ["--rate", "10", "--requests", "6"],
        "conversations": ["--concurrency", "2", "--requests", "6", "--turns", "3", "--think", "0.01"],
    }
    out = tmp_path / "out"
    latency("run", "--url", service.url, "--mode", mode, *load[mode], *SMALL, "--out", str(out))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (stage,) = results["stages"]
    assert (stage["total"]["requests"], stage["total"]["failures"]) == (stage["total"]["ok"], {})
    assert all(request["completion_tokens"] == 8 for request in results["requests"])
    if mode == "conversations":  # later turns find the earlier ones in the engine's cache
        assert stage["server"]["prefix_hit_rate"] > 0
    assert {path.suffix for path in out.iterdir()} >= {".json", ".csv", ".md", ".png"}


def test_a_service_compared_with_itself_fails_nothing(service: RunningService, tmp_path: Path) -> None:
    out = tmp_path / "out"
    latency(
        "compare", service.url, service.url, "--concurrency", "1", "--rounds", "2", "--requests", "2", *SMALL,
        "--out", str(out),
    )  # fmt: skip
    assert "95% intervals" in (out / "report.md").read_text(encoding="utf-8")
