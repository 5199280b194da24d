"""A run's metrics: one JSON line a log step, a line for people, and a picture of the loss."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback

SHOWN = {"loss": "loss", "eval_loss": "held-out loss", "tokens_per_second": "tok/s", "router/entropy": "router entropy"}


class Journal(TrainerCallback):
    """Appends to `path`. After a resume, entries past the checkpoint are dropped: those steps are taken again."""

    def __init__(self, path: Path, *, main: bool) -> None:
        self.path = path
        self.main = main
        self.entries: list[dict[str, Any]] = []
        self.started = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = (state.global_step, time.monotonic())
        if state.global_step and self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            self.entries = [entry for entry in lines if entry["step"] <= state.global_step]
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        entry = {"step": state.global_step, **logs}
        self.entries.append(entry)
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if shown := [f"{label} {logs[key]:.4g}" for key, label in SHOWN.items() if key in logs]:
            line = f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}  {self._eta(state)}"
            tqdm.write(line, file=sys.stderr)

    def _eta(self, state: Any) -> str:
        step, then = self.started
        done = max(1, state.global_step - step)
        left = (time.monotonic() - then) / done * (state.max_steps - state.global_step)
        return f"{left / 3600:.1f} h left" if left > 5400 else f"{left / 60:.1f} min left"

    def last(self, key: str) -> float | None:
        return next((entry[key] for entry in reversed(self.entries) if key in entry), None)

    def step_of(self, key: str) -> int | None:
        """The last step that logged `key`."""
        return next((entry["step"] for entry in reversed(self.entries) if key in entry), None)

    def draw(self, path: Path) -> None:
        """The training and held-out loss over steps, as a PNG."""
        if not self.main:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="optimiser step", ylabel="loss (nats per token)")
        for key, label in (("loss", "training"), ("eval_loss", "held out")):
            points = [(entry["step"], entry[key]) for entry in self.entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.legend()
        figure.savefig(path, dpi=120)
