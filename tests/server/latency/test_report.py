"""Files, tables and pictures from one measurement of the scripted endpoint."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from server.latency import report, results
from server.latency.cli import app
from tests.server.latency.scripted import Scripted


def command(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.fixture(scope="module")
def folder(scripted_endpoint: Scripted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    flags = ("--url", scripted_endpoint.url, "--model", "steady", "--reply-tokens", "6", "--requests", "6")
    command("run", *flags, "--concurrency", "1,2,4", "--languages", "en,ar,mixed", "--out", str(out))
    return out


def test_the_results_file_reads_back_whole(folder: Path) -> None:
    found = results.read(folder / "results.json")
    assert (found.format, found.version, found.kind) == ("bimedix-latency", 1, "run")
    assert [stage.level for stage in found.stages] == [1, 2, 4]
    assert found.targets[0].checkpoint == "c0ffee"
    assert found.targets[0].version == '{"version":"scripted"}'
    assert found.machine.cores >= 1
    assert found.machine.packages["aiohttp"]
    assert found.settings["reply_tokens"] == 6


def test_the_csv_has_one_line_per_request(folder: Path) -> None:
    with (folder / "requests.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.read(folder / "results.json").requests) == 6 + 6 + 8
    assert {row["outcome"] for row in rows} == {"ok"}


def test_the_markdown_names_what_was_measured(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "closed 4" in text
    assert "4 Arabic" in text
    assert "c0ffee" in text


@pytest.mark.parametrize("name", ["latency.png", "throughput.png", "languages.png"])
def test_pictures_are_drawn(folder: Path, name: str) -> None:
    with Image.open(folder / name) as picture:
        assert picture.size[0] > 1000
        extrema = picture.convert("RGB").getextrema()
    assert extrema != ((255, 255), (255, 255), (255, 255))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"format": "bimedix-latency", "version": 2}'])
def test_other_files_are_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        results.read(path)


def test_json_is_the_last_line_and_comparisons_are_drawn(scripted: Scripted, tmp_path: Path) -> None:
    flags = ("--model-a", "steady", "--model-b", "steady", "--rounds", "2", "--requests", "2", "--reply-tokens", "4")
    levels = ("--concurrency", "1,2", "--out", str(tmp_path))
    printed = command("compare", scripted.url, f"{scripted.url}/v1", *flags, *levels, "--json")
    found = json.loads(printed.splitlines()[-1])
    assert found["kind"] == "compare"
    assert [comparison["level"] for comparison in found["comparisons"]] == [1, 2]
    assert "requests" not in found
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_failures_and_a_saturated_client_are_said(scripted: Scripted) -> None:
    flags = ("--url", scripted.url, "--model", "faults", "--concurrency", "1", "--requests", "3", "--reply-tokens", "4")
    printed = command("run", *flags)
    assert "failed: 1 http error (429), 1 stream error" in printed


def test_tables_are_aligned_markdown() -> None:
    lines = report.table(["Name", "n"], [["a", "1"], ["longer", "22"]]).splitlines()
    assert lines == ["| Name   |   n |", "| ------ | --: |", "| a      |   1 |", "| longer |  22 |"]


def test_table5_prints_the_table_and_one_json_line() -> None:
    printed = command("table5", "--assume", "corrected.prompt_tokens=1", "--json")
    assert "8.6x printed" in printed
    assert "above the ceiling of 159.9" in printed
    assert "Not identifiable" in printed
    found = json.loads(printed.splitlines()[-1])
    assert [row["row"]["name"] for row in found["rows"]][-1] == "BiMediX"
    assert found["corrected"]["assumptions"]["prompt_tokens"] == 1
    assert found["reproduced"]["assumptions"]["memory_efficiency"] == 0.8


def test_plan_prints_words_for_both_languages() -> None:
    printed = command("plan", "--gpu", "a100-80gb", "--count", "2", "--dtype", "bf16", "--json")
    assert "364,642 KV tokens" in printed
    assert "Arabic words/s" in printed
    assert json.loads(printed.splitlines()[-1])["fits"]
    assert "Does not fit" in command("plan", "--gpu", "l40s")


def test_plan_reads_the_embedded_checkpoint() -> None:
    embedded = Path(__file__).parents[3] / "server" / "embedded"
    found = json.loads(command("plan", "--gpu", "l4", "--model", str(embedded), "--json").splitlines()[-1])
    assert found["fits"]
    assert 1 < found["fertility"]["ar"]["tokens_per_word"] < 6


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--gpu", "abacus"),
        ("plan", "--gpu", "h200", "--dtype", "fp7"),
        ("plan", "--gpu", "h200", "--model", "nothing"),
        ("plan", "--gpu", "h200", "--length", "many"),
        ("table5", "--assume", "colour=red"),
        ("table5", "--results", "missing.json"),
        ("run", "--concurrency", "many"),
        ("run", "--languages", "fr"),
        ("run", "--mode", "fast"),
        ("compare", "http://127.0.0.1:9", "http://127.0.0.1:9", "--concurrency", "0"),
    ],
)
def test_wrong_flags_are_one_line_usage_errors(arguments: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://10.1.2.3"])
def test_an_endpoint_that_cannot_be_measured_ends_with_one(url: str) -> None:
    outcome = CliRunner().invoke(app, ["run", "--url", url])
    assert outcome.exit_code == 1


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, server.latency.cli; print({'torch', 'vllm', 'numpy', 'aiohttp', 'matplotlib'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
