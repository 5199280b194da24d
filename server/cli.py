"""The `bimedix` command. Heavy modules are imported by the commands that need them, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from server.conversations.cli import app as conversations_app
from server.latency.cli import app as latency_app
from server.settings import Settings

app = typer.Typer(
    name="bimedix",
    help="Serve BiMediX, a bilingual Arabic-English medical Mixtral, behind OpenAI's API. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(conversations_app, name="conversations")
app.add_typer(latency_app, name="latency")


def default(name: str) -> str:
    """A setting's default as help shows it; the value itself comes from the environment or from `Settings`."""
    return str(Settings.model_fields[name].default)


def fail(message: str) -> NoReturn:
    typer.secho(f"bimedix: {message}", fg="red", err=True)
    raise typer.Exit(2)


SERVE_HELP = """Load a checkpoint in vLLM and serve it.

Without --model it serves the small demonstration checkpoint that comes with this package. Every engine flag of vLLM is
passed on unchanged, for example:

  bimedix serve                                                       demonstration model, on a CPU

  bimedix serve --model BiMediX/BiMediX-Bi --tensor-parallel-size 2   two A100-80GB, bfloat16

  bimedix serve --model DIR --max-model-len 8192                      any merged checkpoint

Each option can also be set in the environment, as BIMEDIX_ and its name: BIMEDIX_PORT=8001.
"""


@app.command(
    help=SERVE_HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}
)
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Checkpoint directory or hub id.", show_default="demonstration model")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name that requests use.", show_default=default("served_model_name"))] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=default("host"))] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=default("port"))] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a NAME:KEY a line; or set BIMEDIX_API_KEYS.", show_default="no keys")] = None,
    allow_anonymous: Annotated[bool | None, typer.Option("--allow-anonymous", help="Listen beyond this machine without keys.")] = None,
    language_policy: Annotated[str | None, typer.Option(help="off, guide or guard: how the reply's language is kept.", show_default=default("language_policy"))] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", show_default=default("max_body_bytes"))] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long SIGTERM waits for running replies.", show_default=default("drain_seconds"))] = None,
) -> None:
    given: dict[str, Any] = {
        name: value for name, value in locals().items() if name != "context" and value is not None
    }
    settings = checked_settings(given, tuple(context.args))
    from server.serve import run

    try:
        sys.exit(run(settings))
    except ValueError as error:
        fail(str(error))


def checked_settings(given: dict[str, Any], engine_flags: tuple[str, ...]) -> Settings:
    """Flags over the environment over defaults; ends the process with a line that says what to change."""
    if engine_flags and not engine_flags[0].startswith("-"):
        fail(f"unexpected argument {engine_flags[0]!r}; a checkpoint is named with --model")
    try:
        return Settings(**given, engine_flags=engine_flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"][:1])
        fail(name + first["msg"].removeprefix("Value error, "))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The service to talk to.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="BIMEDIX_API_KEY", help="Key, where the service asks for one.")] = "none",
    language: Annotated[str, typer.Option(help="Language of the replies: auto, en or ar.")] = "auto",
) -> None:
    """Talk to a running service from the terminal, in English or Arabic. Ctrl-D ends, an empty line starts anew."""
    from server.chat import converse

    converse(url, api_key, language)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
