"""`bimedix conversations`: export, purge, migrate and count what the store holds."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from server.settings import seconds

if TYPE_CHECKING:
    from server.conversations.store import Store

T = TypeVar("T")

app = typer.Typer(help="Look after stored conversations.", no_args_is_help=True)

StoreUrl = Annotated[
    str | None,
    typer.Option("--store", envvar="BIMEDIX_STORE", metavar="URL", help="By default the user's own SQLite file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


class Format(StrEnum):
    vicuna = "vicuna"


@app.command("export")
def export_command(
    store: StoreUrl = None,
    format: Annotated[Format, typer.Option(help="Vicuna records, one JSON object a line.")] = Format.vicuna,
    output: Annotated[Path | None, typer.Option(help="File to write; by default standard output.")] = None,
) -> None:
    """Write every conversation as a Vicuna record, as `bimedix-train tune` reads them."""
    _run(_export(_store(store), output))


@app.command()
def purge(
    store: StoreUrl = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Also what had no turn for so long: 90s, 30m, 12h, 30d.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete expired conversations for good and rewrite the store without them; it is locked meanwhile."""
    try:
        limit = seconds(older_than) if older_than is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--older-than") from None
    purged = _run(_purge(_store(store), limit))
    _report(as_json, f"Deleted {purged[0]} conversations and {purged[1]} responses without one.", **purged._asdict())


@app.command()
def migrate(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Bring the store's schema to this version. Stop the service first, and keep a backup."""
    version = _run(_migrate(store))
    _report(as_json, f"The store has schema {version}.", schema=version)


@app.command()
def count(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Say how many conversations the store holds, and how many turns in each state."""
    counts = _run(_count(_store(store)))
    _report(as_json, "\n".join(f"{name:<14}{number:>10}" for name, number in counts.items()), **counts)


def _report(as_json: bool, text: str, **values: Any) -> None:
    typer.echo(json.dumps(values) if as_json else text)


def _store(url: str | None) -> Store:
    """The store at `url`, which must be there already: a command on a mistyped path creates nothing."""
    from server.conversations.database import default_url
    from server.conversations.store import Store

    try:
        store = Store(url or default_url())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--store") from None
    path = store.database.url.database
    if store.database.is_sqlite and path and not Path(path).exists():
        raise typer.BadParameter(f"there is no conversation store at {path}", param_hint="--store")
    return store


def _run(work: Coroutine[Any, Any, T]) -> T:
    from server.conversations.errors import StoreError

    try:
        return asyncio.run(work)
    except StoreError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


async def _export(store: Store, output: Path | None) -> None:
    target = nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8")
    async with store:
        counts = await store.count()
        with target as stream, typer.progressbar(length=counts["conversations"], file=sys.stderr) as bar:
            exported = 0
            async for record in store.export():
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                exported += 1
                bar.update(1)
    typer.echo(f"Exported {exported} conversations.", err=True)


async def _purge(store: Store, older_than: float | None) -> Any:
    async with store:
        return await store.purge(older_than)


async def _count(store: Store) -> dict[str, int]:
    async with store:
        return await store.count()


async def _migrate(url: str | None) -> str:
    from server.conversations import schema
    from server.conversations.database import Database, default_url

    database = Database(url or default_url(), patient=True)
    try:
        return await schema.migrate(database)
    finally:
        await database.dispose()
