"""How far a measurement is: bars on a terminal, one line per finished stage elsewhere. Both on standard error."""

from __future__ import annotations

from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Lines:
    """One plain line when a stage has finished."""

    def begin(self, stage: str, requests: int) -> None:
        """Stages are reported when they end."""

    def advance(self) -> None:
        """Single requests are not reported."""

    def finish(self, line: str) -> None:
        typer.echo(line, err=True)


class Bars:
    """A bar for the stage that runs, and a line for every finished one above it."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Few redraws: they run on the event loop whose delay is being measured.
        self.progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
        self.task: TaskID | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.progress.stop()

    def begin(self, stage: str, requests: int) -> None:
        self._clear()
        self.task = self.progress.add_task(stage, total=requests)

    def advance(self) -> None:
        if self.task is not None:
            self.progress.advance(self.task)

    def finish(self, line: str) -> None:
        self._clear()
        self.progress.console.print(line, highlight=False)

    def _clear(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None
