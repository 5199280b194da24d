"""The `bimedix-train` command."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from training.errors import Refused

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a Mixtral checkpoint as BiMediX was, and merge the result into a checkpoint the service loads.",
)
Json = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]


class Use(StrEnum):
    """When a turn gets its directive: always, or only where it is in another language than the reply."""

    ALWAYS = "always"
    MISMATCH = "mismatch"


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings, as in training/configs.")],
    plan: Annotated[bool, typer.Option("--plan", help="Print parameters and memory per GPU; load no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the output.")] = False,
    as_json: Json = False,
) -> None:
    """QLoRA on q, k, v, every expert and the router, with the loss on the assistant's turns only."""
    from training.recipe import read_recipe

    with _faults():
        settings = read_recipe(recipe)
        if plan:
            from training.plan import plan_for

            made = plan_for(settings)
            typer.echo(json.dumps(made.as_dict()) if as_json else made.table())
            return
        from training.tune import run

        _conclude(run(settings, resume=resume), as_json=as_json)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, such as the one `tune` wrote.")],
    output: Annotated[Path, typer.Option(help="Checkpoint directory to create.")],
    base: Annotated[str | None, typer.Option(help="Base checkpoint; the adapter names it otherwise.")] = None,
    checkpoint_id: Annotated[str | None, typer.Option("--id", help="The checkpoint's id in its manifest.")] = None,
    description: Annotated[str, typer.Option(help="One line on the checkpoint for its manifest.")] = "",
    directive_en: Annotated[str, typer.Option(help="What asks this checkpoint for English, for its manifest.")] = "",
    directive_ar: Annotated[str, typer.Option(help="What asks this checkpoint for Arabic, for its manifest.")] = "",
    directive_use: Annotated[Use, typer.Option(help="Whether each turn needs its directive.")] = Use.ALWAYS,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base in fp32, tensor by tensor, and write a bf16 checkpoint with its manifest."""
    with _faults():
        from training.merge import merge_adapter

        directives = {language: text for language, text in (("en", directive_en), ("ar", directive_ar)) if text}
        summary = merge_adapter(
            adapter,
            output,
            base=base,
            checkpoint_id=checkpoint_id,
            description=description,
            directives=directives,
            directive_use=directive_use.value,
        )
        _conclude(summary, as_json=as_json)


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """What a user can put right, as one line instead of a traceback."""
    try:
        yield
    except (Refused, FileExistsError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from None


def _conclude(summary: dict[str, Any], as_json: bool) -> None:
    """The last thing a command says, once however many processes share it."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for name, value in summary.items():
        typer.echo(
            f"{name.replace('_', ' '):24}{value:,}" if isinstance(value, int) else f"{name.replace('_', ' '):24}{value}"
        )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
