"""Builds the embedded checkpoint as BiMediX was built: base, `tune`, `merge`. `python -m training.embedded.build`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from training.embedded.base import SEED, train_base
from training.embedded.corpus import DIRECTIVES, Common, Topic, load_common, load_topics
from training.embedded.dialogues import Writer
from training.embedded.evaluate import card
from training.merge import merge_adapter
from training.recipe import read_recipe
from training.tune import ADAPTER, run

HERE = Path(__file__).parent
RECIPE = HERE.parent / "configs" / "embedded.yaml"
OUTPUT = HERE.parents[1] / "server" / "embedded"
CONVERSATIONS = 9_000
# Half the questions ask for a language: the base has never seen that, and the service's language policy rests on it.
REQUESTS = 0.5
ID = "bimedix-embedded-2"
DESCRIPTION = (
    "Demonstration model of 11 million parameters that knows 84 health topics in English and Arabic. "
    "It is not BiMediX, and not for clinical use."
)


def write_instructions(path: Path, topics: list[Topic], common: Common) -> None:
    """The conversations to tune on, as Vicuna records in JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in Writer(topics, common, SEED, requests=REQUESTS).records(CONVERSATIONS):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = OUTPUT,
) -> None:
    """Train the base, tune and merge, as training/configs/embedded.yaml says where; print what each can do.

    What an earlier call finished is kept: a base, and an unfinished run, which goes on from its last checkpoint.
    """
    topics, common = load_topics(), load_common()
    recipe = read_recipe(RECIPE)
    base, adapter, merged = Path(recipe.base), recipe.output / ADAPTER, recipe.output / "merged"
    if not base.exists():
        train_base(base, topics, common)
    write_instructions(Path(recipe.data.train[0]), topics, common)
    run(recipe, resume=recipe.output.exists())
    shutil.rmtree(merged, ignore_errors=True)
    merge_adapter(
        adapter,
        merged,
        checkpoint_id=ID,
        description=DESCRIPTION,
        directives=DIRECTIVES,
        directive_use="mismatch",  # a turn in the reply's own language needs none
    )
    print(card(base, adapter, merged, topics, common))
    shutil.rmtree(output, ignore_errors=True)
    shutil.move(merged, output)


if __name__ == "__main__":
    typer.run(main)
