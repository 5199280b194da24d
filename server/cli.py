"""The `bimedix` command. Heavy modules are imported by the commands that need them, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from server.checkpoints import remote
from server.checkpoints.cli import app as checkpoints_app
from server.conversations.cli import app as conversations_app
from server.environment import prepare
from server.language.cli import app as language_app
from server.latency.cli import app as latency_app
from server.settings import Settings

app = typer.Typer(
    name="bimedix",
    help="Serve BiMediX, a bilingual Arabic-English medical Mixtral, behind OpenAI's API. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
remote.add_to(checkpoints_app)
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(remote.adapters_app, name="adapters")
app.add_typer(conversations_app, name="conversations")
app.add_typer(language_app, name="language")
app.add_typer(latency_app, name="latency")


def setting(name: str, *flags: str) -> Any:
    """An option that is explained as its setting is, and left to the environment and the defaults when not given."""
    field = Settings.model_fields[name]
    shown = field.default if isinstance(field.default, str | int | float) and name != "model" else None
    return typer.Option(
        *flags, help=field.description, show_default=str(shown) if shown not in (None, False) else False
    )


def fail(message: str) -> NoReturn:
    typer.secho(f"bimedix: {message}", fg="red", err=True)
    raise typer.Exit(2)


SERVE_HELP = """Load a checkpoint in vLLM and serve it.

Without --model it serves the small demonstration checkpoint that comes with this package. Every engine flag of vLLM is
passed on unchanged, for example:

  bimedix serve  (the demonstration model, on a CPU)

  bimedix serve --model BiMediX/BiMediX-Bi --tensor-parallel-size 2  (two A100-80GB)

  bimedix serve --model DIR --max-model-len 8192  (a merged checkpoint)

Each option can also be set in the environment, as BIMEDIX_ and its name: BIMEDIX_PORT=8001.
"""


@app.command(
    help=SERVE_HELP,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def serve(
    context: typer.Context,
    model: Annotated[str | None, setting("model")] = None,
    served_model_name: Annotated[str | None, setting("served_model_name")] = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    api_key_file: Annotated[Path | None, setting("api_key_file")] = None,
    allow_anonymous: Annotated[bool | None, setting("allow_anonymous", "--allow-anonymous")] = None,
    store: Annotated[str | None, setting("store")] = None,
    conversation_ttl: Annotated[str | None, setting("conversation_ttl")] = None,
    language_policy: Annotated[str | None, setting("language_policy")] = None,
    checkpoints: Annotated[Path | None, setting("checkpoints")] = None,
    admin_key_file: Annotated[Path | None, setting("admin_key_file")] = None,
    adapter: Annotated[list[str] | None, setting("adapters", "--adapter")] = None,
    canaries: Annotated[Path | None, setting("canaries")] = None,
    activation_drain_seconds: Annotated[float | None, setting("activation_drain_seconds")] = None,
    activations_at_once: Annotated[int | None, setting("activations_at_once")] = None,
    max_body_bytes: Annotated[int | None, setting("max_body_bytes")] = None,
    drain_seconds: Annotated[float | None, setting("drain_seconds")] = None,
) -> None:
    given: dict[str, Any] = {name: value for name, value in locals().items() if name != "context" and value is not None}
    if adapters := given.pop("adapter", None):
        given["adapters"] = tuple(adapters)
    settings = checked_settings(given, tuple(context.args))
    prepare(settings)
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
    api_key: Annotated[
        str, typer.Option(envvar="BIMEDIX_API_KEY", help="Key, where the service asks for one.")
    ] = "none",
    language: Annotated[str, typer.Option(help="Language of the replies: auto, en or ar.")] = "auto",
) -> None:
    """Talk to a running service from the terminal, in English or Arabic. Ctrl-D ends, an empty line starts anew."""
    from server.chat import converse

    converse(url, api_key, language)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
