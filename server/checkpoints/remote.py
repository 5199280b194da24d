"""`bimedix checkpoints activate`, `bimedix adapters`: what is asked of a running service, with an admin key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

DONE = {"activated", "unchanged"}

Url = Annotated[str, typer.Option(envvar="BIMEDIX_URL", help="The service, or any replica of it.")]
Key = Annotated[str, typer.Option(envvar="BIMEDIX_ADMIN_KEY", help="An admin key; better in the environment.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]
LOCAL = "http://127.0.0.1:8000"


adapters_app = typer.Typer(help="The LoRA adapters that a running service applies.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add these commands to `bimedix checkpoints`."""
    for command in (activate, promote, abort, status, audit):
        app.command()(command)


def activate(
    id: Id,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Canary: only for this share of the conversations.")
    ] = None,
    url: Url = LOCAL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Serve a checkpoint from now on, on all replicas, without dropping a request. To go back, activate the old one."""
    body = {} if share is None else {"share": share}
    _follow(url, admin_key, f"checkpoints/{id}/activate", body, as_json)


def promote(url: Url = LOCAL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """Serve the canary's checkpoint to everyone."""
    _follow(url, admin_key, "promote", {}, as_json)


def abort(url: Url = LOCAL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """Take the canary back: everyone is served what was desired before it."""
    _follow(url, admin_key, "abort", {}, as_json)


def status(url: Url = LOCAL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """What is wanted, and what each replica serves."""
    found = _get(url, admin_key, "status")
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name in ("desired", "previous", "candidate", "share", "revision"):
        typer.echo(f"{name:<12}{'-' if found[name] is None else found[name]}")
    if found["busy"]:
        typer.echo(f"{'busy':<12}{found['busy']['who']}: {found['busy']['what']}")
    for one in found["replicas"]:
        canary = " canary" if one["canary"] else ""
        typer.echo(f"{one['id']}  {one['state']}{canary}  {one['checkpoint']}  {one['message']}".rstrip())


def audit(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many actions, the newest first.")] = 20,
    url: Url = LOCAL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Who did what, and what came of it."""
    from datetime import UTC, datetime

    found = _get(url, admin_key, f"audit?limit={limit}")
    if as_json:
        typer.echo(json.dumps(found["data"]))
        return
    for one in found["data"]:
        when = datetime.fromtimestamp(one["begun_at"], UTC).isoformat(timespec="seconds")
        what = f"{one['what']} {one['checkpoint'] or ''}".strip()
        typer.echo(f"{when}  {one['who']}  {what}  {one['result'] or 'not ended'}  {one['message'] or ''}".rstrip())


Name = Annotated[str, typer.Argument(metavar="NAME", help="What requests call it.")]


@adapters_app.command("list")
def list_adapters(url: Url = LOCAL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """The adapters of a replica, and how many requests use each."""
    found = _get(url, admin_key, "adapters")["data"]
    lines = [
        f"{one['name']}  {one['revision'] or '-'}  {one['requests']} requests  {one['problem'] or ''}".rstrip()
        for one in found
    ]
    typer.echo(json.dumps(found) if as_json else "\n".join(lines) or "There is no adapter.")


@adapters_app.command("add")
def add_adapter(
    name: Name,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where every replica finds it: an adapter of `bimedix-train tune`.")
    ],
    url: Url = LOCAL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Apply an adapter from now on. Under a name that is taken it replaces the one before; nobody is interrupted."""
    body = {"directory": str(directory.absolute())}
    report = _ask("PUT", url, admin_key, f"adapters/{quote(name, safe='')}", json=body)
    typer.echo(json.dumps(report) if as_json else f"{report['result']}: {report['revision']}")


@adapters_app.command("remove")
def remove_adapter(name: Name, url: Url = LOCAL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """Take an adapter away; ends when the last request that uses it has ended."""
    report = _ask("DELETE", url, admin_key, f"adapters/{quote(name, safe='')}")
    typer.echo(json.dumps(report) if as_json else f"removed: {report['revision']}, after {report['seconds']:.1f} s")


def _get(url: str, key: str, path: str) -> Any:
    return _ask("GET", url, key, path)


def _ask(method: str, url: str, key: str, path: str, **options: Any) -> Any:
    import httpx

    # Only reading is known to be quick: an adapter may be large, and its last request long.
    timeout = 30 if method == "GET" else None
    with _faults():
        response = httpx.request(method, f"{url}/admin/{path}", headers=_headers(key), timeout=timeout, **options)
        _refuse(response)
        return response.json()


def _follow(url: str, key: str, path: str, body: dict[str, Any], as_json: bool) -> None:
    """Print an action's progress, and its report."""
    import httpx

    report: dict[str, Any] = {"result": "interrupted", "message": "the service ended the stream without a report"}
    with _faults(), httpx.stream("POST", f"{url}/admin/{path}", headers=_headers(key), json=body, timeout=60) as stream:
        if stream.status_code != 200:
            stream.read()
            _refuse(stream)
        for name, data in events(stream.iter_lines()):
            if name == "report":
                report = data
            elif name == "replicas":
                typer.echo(f"replicas: {data['ready']} of {data['of']}", err=True)
            else:
                typer.echo(f"{data['phase']} ...", err=True)
    typer.echo(json.dumps(report) if as_json else _text(report))
    if report["result"] not in DONE:
        raise typer.Exit(1)


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events with JSON in them."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['result']}: {report.get('checkpoint', '')} {report.get('message', '')}".strip()]
    lines += [f"  {phase:<10}{taken:9.3f} s" for phase, taken in report.get("seconds", {}).items()]
    if report.get("waited_requests"):
        lines.append(f"  {report['waited_requests']} requests waited, at most {report['longest_wait_seconds']:.3f} s")
    return "\n".join(lines)


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _refuse(response: Any) -> None:
    if response.status_code != 200:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"the service answered {response.status_code}"
        typer.echo(message, err=True)
        raise typer.Exit(1)


@contextmanager
def _faults() -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        typer.echo(f"no answer from the service: {error or type(error).__name__}", err=True)
        raise typer.Exit(1) from None
