"""How far a long check or copy is: a bar on a terminal, a line for each step elsewhere. Both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from server.checkpoints.verify import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """What to give to the registry and to `verify` as their progress."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        yield _bars(bars)


def _lines() -> Progress:
    said: set[str] = set()

    def progress(step: str, done: int, total: int) -> None:
        if step not in said:
            said.add(step)
            typer.echo(f"{step}: {total:,} bytes" if total else step, err=True)

    return progress


def _bars(bars: Bars) -> Progress:
    tasks: dict[str, TaskID] = {}

    def progress(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total or None)
        bars.update(tasks[step], completed=done)

    return progress
