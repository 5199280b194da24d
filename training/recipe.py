"""The configuration of a fine-tuning run: one YAML file, checked before anything loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.data import sources
from training.errors import Refused

Positive = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Strict):
    train: tuple[str, ...] = Field(min_length=1, description="JSONL, Parquet, a folder of them, or a Hub dataset id.")
    held_out: int = Field(ge=0, description="Records kept from training to evaluate on.")
    max_length: Positive = Field(description="Tokens a packed row holds; longer records are cut.")
    packing: bool = Field(description="Put several records in a row; attention never crosses from one to the next.")
    max_rejected: float = Field(default=0.01, ge=0, lt=1, description="Share of bad records that stops the run.")


class Lora(Strict):
    rank: Positive
    alpha: Positive


class Optimiser(Strict):
    learning_rate: float = Field(gt=0, le=0.1)
    warmup_steps: int = Field(ge=0)
    epochs: float = Field(gt=0)
    effective_batch: Positive = Field(description="Rows an optimiser step sees, over all processes.")
    per_device_batch: Positive = 1


class Run(Strict):
    """How often to log, evaluate and save, in optimiser steps."""

    log_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    keep_checkpoints: Positive = 2


class Recipe(Strict):
    base: str = Field(description="Mixtral checkpoint: a directory or a Hub id.")
    revision: str | None = Field(default=None, description="Commit of the Hub id.")
    output: Path
    quantization: Literal["nf4", "none"]
    lora: Lora
    data: Data
    optimiser: Optimiser
    run: Run
    gradient_checkpointing: bool
    zero: Literal[0, 2, 3] = Field(description="DeepSpeed ZeRO stage, where several processes share the run.")
    gpus: Positive = Field(default=1, description="What the plan counts on; another number keeps the effective batch.")
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        self.accumulation(self.gpus)
        if self.zero and self.gpus == 1:
            raise ValueError("ZeRO partitions a run over several processes: set gpus, or zero to 0")
        return self

    def check_inputs(self) -> None:
        """Raises Refused when the base or a data source is not there. A Hub id is taken at its word."""
        self.check_base()
        for source in self.data.train:
            sources.files(source)

    def check_base(self) -> None:
        if not Path(self.base).is_dir() and not sources.is_hub_id(self.base):
            raise Refused(f"base: {self.base} does not exist")

    def accumulation(self, processes: int) -> int:
        """Micro-batches an optimiser step adds up. Raises ValueError when the effective batch does not divide."""
        steps, rest = divmod(self.optimiser.effective_batch, self.optimiser.per_device_batch * processes)
        if rest or not steps:
            raise Refused(
                f"an effective batch of {self.optimiser.effective_batch} is not a multiple of "
                f"{processes} processes x {self.optimiser.per_device_batch} rows"
            )
        return steps

    @property
    def digest(self) -> str:
        """sha256 of everything that decides the result; where it is written and how often it logs does not."""
        decisive = self.model_dump(mode="json", exclude={"output", "run", "gpus"})
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The checked recipe in a YAML file. Relative local paths are taken from the working directory.

    Raises Refused, which names every fault.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{path} is not a mapping of settings")
    try:
        return Recipe.model_validate({**found, **(overrides or {})})
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False)
        ]
        raise Refused(f"{path}: " + "; ".join(faults)) from None
