"""What goes wrong with checkpoints; each message says what to do next."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The registry cannot do what it was asked to."""


class UnknownCheckpoint(CheckpointError):
    """No checkpoint has this id."""


class InvalidCheckpoint(CheckpointError):
    """The checkpoint is not one that can be served; `problems` lists everything that was found."""

    def __init__(self, id: str, problems: list[str]) -> None:
        super().__init__(f"checkpoint {id} is refused: {'; '.join(problems)}")
        self.id = id
        self.problems = problems
