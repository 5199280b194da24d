"""`bimedix checkpoints`: what is in the registry, and bringing checkpoints into it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from getpass import getuser
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.checkpoints.errors import CheckpointError, InvalidCheckpoint
from server.conversations.cli import StoreUrl
from server.conversations.errors import StoreError
from server.settings import Settings

if TYPE_CHECKING:
    from server.checkpoints.deployment import Deployment
    from server.checkpoints.registry import Checkpoint, Registry

app = typer.Typer(help="Keep the checkpoints that a service can be given.", no_args_is_help=True)

Root = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        envvar="BIMEDIX_CHECKPOINTS",
        metavar="DIR",
        help=Settings.model_fields["checkpoints"].description,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]


@app.command("list")
def list_command(checkpoints: Root = None, as_json: AsJson = False) -> None:
    """The checkpoints of the registry, oldest first."""
    with _faults():
        registry = _registry(checkpoints)
        found = registry.list()
        broken = sorted(set(registry.ids()) - {checkpoint.id for checkpoint in found})
        described = [_described(checkpoint) for checkpoint in found]
    width = max(map(len, registry.ids()), default=0)
    lines = [
        f"{one['id']:<{width}}  {one['created']}  {one['bytes'] / 1e9:8.3f} GB  {_plain(one['description'])}"
        for one in described
    ]
    lines += [f"{id:<{width}}  cannot be used: see `bimedix checkpoints show {id}`" for id in broken]
    text = "\n".join(lines) or f"There is no checkpoint in {registry.root}: `bimedix checkpoints add` brings one in."
    _report(as_json, text, checkpoints=described, unusable=broken)


@app.command()
def show(id: Id, checkpoints: Root = None, as_json: AsJson = False) -> None:
    """What the manifest of one checkpoint says."""
    with _faults():
        described = _described(_registry(checkpoints).get(id))
    text = "\n".join(f"{name:<16}{_plain(value)}" for name, value in described.items() if name != "files")
    digests = [f"{digest}  {name}" for name, digest in described["files"].items()]
    _report(as_json, "\n".join([text, "", *digests]), **described)


@app.command("verify")
def verify_command(
    target: Annotated[str, typer.Argument(metavar="ID|DIR", help="In the registry, or any checkpoint directory.")],
    serving: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Checkpoint directory that a service runs: could this one replace it while it runs?",
        ),
    ] = None,
    checkpoints: Root = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte: hashes, names, shapes and values of all tensors, and nothing that runs code."""
    from server.checkpoints.progress import shown
    from server.checkpoints.registry import read_checkpoint
    from server.checkpoints.verify import verify

    with _faults(as_json):
        directory = Path(target)
        in_registry = checkpoints is not None and "/" not in target and (checkpoints / target).is_dir()
        if not in_registry and not directory.is_dir():
            raise typer.BadParameter(f"{target} is neither in the registry nor a directory", param_hint="ID|DIR")
        checkpoint = _registry(checkpoints).get(target) if in_registry else read_checkpoint(directory)
        size, started = checkpoint.size, time.monotonic()
        with shown() as progress:
            verify(checkpoint, serving, progress)
        seconds = time.monotonic() - started
    text = (
        f"{checkpoint.id} is what its manifest says: {size:,} bytes in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s"
    )
    _report(as_json, text, id=checkpoint.id, path=str(checkpoint.path), problems=[], bytes=size, seconds=seconds)


@app.command()
def add(
    source: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint directory, or an adapter of `tune`.")
    ],
    base: Annotated[str | None, typer.Option(help="What an adapter is merged into; it names its base itself.")] = None,
    id: Annotated[str | None, typer.Option(help="The id that a merged adapter gets.")] = None,
    checkpoints: Root = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy a checkpoint into the registry, verified; an adapter is merged first."""
    from server.checkpoints.adapters import is_adapter, merge
    from server.checkpoints.progress import shown

    merging = is_adapter(source)
    if not merging and (base or id):
        raise typer.BadParameter("--base and --id are for merging, and this is no adapter", param_hint="SOURCE")
    with _faults(as_json), _audited(_deployment_at(store), "add", id or source.resolve().name), shown() as progress:
        registry = _registry(checkpoints)
        if merging:
            added = registry.build(lambda parent: merge(source, parent, base, id), progress)
        else:
            added = registry.add(source, progress)
    _report(as_json, f"{added.id} is in {registry.root}.", **_described(added))


@app.command()
def remove(
    id: Id,
    checkpoints: Root = None,
    store: StoreUrl = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Where there is no store: do not ask whether it is in use.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a checkpoint for good, unless the store says that it is in service or was before. Its id stays taken."""
    with _faults(as_json):
        registry, deployment = _registry(checkpoints), _deployment_at(store)
        if deployment is None and not yes:
            question = f"There is no store to tell. Is {id} neither in service nor was it just before?"
            typer.confirm(question, abort=True, err=True)
        with _audited(deployment, "remove", id):
            if deployment is None:
                registry.remove(id, set())
            else:
                asyncio.run(_remove_unused(registry, id, deployment))
    _report(as_json, f"{id} is removed.", removed=id)


async def _remove_unused(registry: Registry, id: str, deployment: Deployment) -> None:
    """Removes it while nobody can activate it."""
    async with _closed(deployment):
        token = await deployment.take("bimedix checkpoints remove", id)
        try:
            wanted, replicas = await deployment.wanted(), await deployment.replicas()
            used = {wanted.desired, wanted.previous, wanted.candidate, *(replica.checkpoint for replica in replicas)}
            await asyncio.to_thread(registry.remove, id, {name for name in used if name})
        finally:
            await deployment.release(token)


def _deployment_at(store: str | None) -> Deployment | None:
    """The deployment in a store; None where no service has made one yet."""
    from server.checkpoints.deployment import Deployment
    from server.conversations.database import Database, default_url

    try:
        database = Database(store or default_url())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--store") from None
    file = database.url.database
    return None if database.is_sqlite and file and not Path(file).exists() else Deployment(database)


@contextmanager
def _audited(deployment: Deployment | None, what: str, id: str) -> Iterator[None]:
    """Keeps an action at this terminal in the audit log, where there is one. Raises StoreError before it begins."""
    if deployment is None:
        yield
        return
    number = asyncio.run(_begun(deployment, what, id))
    result, message = "failed", ""
    try:
        yield
        result = "done"
    except CheckpointError as error:
        result, message = "refused", str(error)
        raise
    finally:
        asyncio.run(_ended(deployment, number, result, message))


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):
        # Containers run as users without a name.
        return f"user {os.getuid()}"


async def _begun(deployment: Deployment, what: str, id: str) -> int:
    async with _closed(deployment):
        return await deployment.begin_action(f"{_user()} (terminal)", what, id, gethostname()[:128])


async def _ended(deployment: Deployment, number: int, result: str, message: str) -> None:
    async with _closed(deployment):
        await deployment.end_action(number, result, message)


@asynccontextmanager
async def _closed(deployment: Deployment) -> AsyncIterator[None]:
    """Leaves no connection behind: those belong to an event loop, and each step at a terminal has one of its own."""
    try:
        yield
    finally:
        await deployment.database.dispose()


def _registry(root: Path | None) -> Registry:
    from server.checkpoints.registry import Registry

    if root is None:
        raise typer.BadParameter("name the directory of the checkpoints", param_hint="--checkpoints")
    return Registry(root)


@contextmanager
def _faults(as_json: bool = False) -> Iterator[None]:
    """What can be put right, as lines that say how."""
    try:
        yield
    except InvalidCheckpoint as error:
        typer.echo("\n- ".join([f"Checkpoint {error.id} is refused:", *error.problems]), err=True)
        if as_json:
            typer.echo(json.dumps({"id": error.id, "problems": error.problems}))
        raise typer.Exit(1) from None
    except (CheckpointError, StoreError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest.model_dump(mode="json")
    return {"id": checkpoint.id, "path": str(checkpoint.path), "bytes": checkpoint.size, **manifest}


def _plain(value: Any) -> str:
    """As people read it, on one line whatever it holds."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def _report(as_json: bool, text: str, **values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
