"""Activations on a real service: nothing dropped, nothing mixed, nothing stale; and what spoils one changes nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from server.checkpoints.manifest import FILE
from tests.server.checkpoints import twin
from tests.server.checkpoints.conftest import ADMIN, BASE, PATIENCE, TWIN, Administered, comes_from, headers, text
from tests.server.checkpoints.load import PROMPTS, Load

GROWTH = 1.08
"""Of memory between the fifth activation and the last, beyond which something is kept."""
KEY = "an-api-key-for-the-tests"


def until(happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def resident(session: int) -> int:
    """Bytes in memory of all processes of a session."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and os.getsid(int(process.name)) == session:
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (ProcessLookupError, FileNotFoundError):
            continue
    return total


@pytest.mark.parametrize("activations", [12, pytest.param(30, marks=pytest.mark.slow)])
def test_activations_under_load(administered: Administered, activations: int) -> None:
    administered.serve(BASE)
    prompts = [prompt for prompt in PROMPTS if comes_from(text(administered.ask(prompt)[1]), BASE)]
    assert len(prompts) >= 5
    memory: list[int] = []
    waited = 0

    async def activate() -> Load:
        nonlocal waited
        async with Load(administered.url, prompts) as load:
            for number in range(activations):
                report = await asyncio.to_thread(administered.activate, BASE if number % 2 else TWIN)
                assert report["result"] == "activated", report
                waited += report["waited_requests"]
                memory.append(resident(administered.running.process.pid))
        return load

    load = asyncio.run(activate())
    assert not load.failures, load.failures[:5]
    assert min(load.replies[BASE], load.replies[TWIN]) > activations
    assert waited > 0
    assert max(memory[-5:]) < GROWTH * max(memory[:5]), memory


def test_no_prefix_that_another_checkpoint_left_is_read(administered: Administered) -> None:
    """The same prompt before and after, longer than a block: computed anew, and answered as at the first time."""
    question = "What is asthma? " + "Please tell me in plain words, will you? " * 25

    def ask(checkpoint: str) -> str:
        administered.serve(checkpoint)
        fresh, again = (administered.ask(question) for _ in range(2))
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for _, one in (fresh, again)]
        assert cached[0] == 0 and cached[1] > 0
        assert {name for name, _ in (fresh, again)} == {checkpoint}
        return text(fresh[1])

    administered.serve(TWIN)
    replies = [ask(checkpoint) for checkpoint in (BASE, TWIN, BASE, TWIN)]
    assert replies[0] == replies[2] != replies[1] == replies[3]


def test_stored_turns_name_who_answered(administered: Administered) -> None:
    client = administered.running.client()
    conversation = client.conversations.create()
    for checkpoint in (BASE, TWIN):
        administered.serve(checkpoint)
        answer = client.responses.with_raw_response.create(
            input="What is gout?", conversation=conversation.id, max_output_tokens=60
        )
        assert answer.headers["x-bimedix-checkpoint"] == checkpoint
    assert sqlite_value(administered, "SELECT group_concat(checkpoint) FROM turns WHERE checkpoint NOT NULL").endswith(
        f"{BASE},{TWIN}"
    )
    until(lambda: administered.get("status")["replicas"][0]["checkpoint"] == TWIN)
    assert httpx.get(f"{administered.url}/v1/models").json()["data"][0]["checkpoint"] == TWIN
    assert httpx.get(f"{administered.url}/version").json()["checkpoint"] == TWIN
    assert [one["id"] for one in administered.get("checkpoints")["data"] if one["desired"]] == [TWIN]
    assert administered.get(f"checkpoints/{TWIN}")["manifest"]["id"] == TWIN


def sqlite_value(administered: Administered, statement: str) -> Any:
    connection = sqlite3.connect(administered.running.store.removeprefix("sqlite:///"))
    try:
        return connection.execute(statement).fetchone()[0]
    finally:
        connection.close()


# --- what spoils an activation ----------------------------------------------------------------------------------


def corrupt(folder: Path) -> None:
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 0xFF
    shard.write_bytes(bytes(data))


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10_000_000)


def spoil(change: Callable[[twin.Tensors], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        twin.save(folder, tensors)

    return write


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    twin.write_manifest(folder)


def link_out(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / ".elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / ".elsewhere")


def point_out(folder: Path) -> None:
    manifest = (folder / FILE).read_text()
    (folder / FILE).write_text(manifest.replace('"model.safetensors"', '"../twin/model.safetensors"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (corrupt, "model.safetensors"),
        (truncate, "model.safetensors"),
        (spoil(twin.not_a_number), "q_proj"),
        (spoil(twin.wider), "experts.0.w1"),
        (add_pickle, "pytorch_model.bin"),
        (link_out, "is a link"),
        (point_out, "../twin"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    administered: Administered, registry: Path, damage: Callable[[Path], None], reason: str
) -> None:
    serving = administered.get("status")["serving"]
    folder = twin.make(registry, f"bad-{damage.__name__}")
    try:
        damage(folder)
        report = administered.activate(folder.name)
    finally:
        shutil.rmtree(folder)
    assert report["result"] == "refused"
    assert reason in report["message"]
    assert "reload" not in report["seconds"] and "drain" not in report["seconds"]
    assert administered.ask("Hello", max_tokens=2)[0] == serving
    assert administered.get("audit?limit=1")["data"][0]["result"] == "refused"


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "nothing", ".incoming-x", "a" * 200])
def test_names_that_are_no_checkpoint(administered: Administered, name: str) -> None:
    url = f"{administered.url}/admin/checkpoints/{name}/activate"
    response = httpx.post(url, headers=headers(), json={}, timeout=PATIENCE)
    assert response.status_code == 404
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(("name", "reason"), [("noise", "perplexity"), ("collapsed", "router has collapsed")])
def test_what_does_not_pass_the_gate_is_never_seen(administered: Administered, name: str, reason: str) -> None:
    administered.serve(BASE)
    report = administered.activate(name)
    assert (report["result"], report["serving"]) == ("rolled_back", BASE)
    assert reason in report["message"]
    assert report["seconds"]["restore"] > 0
    checkpoint, completion = administered.ask("What is asthma?")
    assert checkpoint == BASE and comes_from(text(completion), BASE)
    assert administered.get("status")["desired"] == BASE


def test_two_at_once_and_who_is_at_it(administered: Administered) -> None:
    """A stream holds the first one in its drain; meanwhile requests wait, and probes do not."""
    administered.serve(BASE)
    with httpx.Client(timeout=PATIENCE) as client:
        body = {
            "messages": [{"role": "user", "content": "What is asthma?"}],
            "stream": True, "max_tokens": 1900, "ignore_eos": True,
        }  # fmt: skip
        with client.stream("POST", f"{administered.url}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            first = administered.follow(f"checkpoints/{TWIN}/activate")
            for _, event in first:
                if event["phase"] == "drain":
                    break
            second = httpx.post(
                f"{administered.url}/admin/checkpoints/noise/activate", headers=headers(), json={}, timeout=PATIENCE
            )
            assert second.status_code == 409
            assert f"ops is at it: activate {TWIN}" in second.json()["error"]["message"]
            assert httpx.get(f"{administered.url}/ready", timeout=PATIENCE).json()["status"] == "activating"
            gone = threading.Thread(target=give_up, args=(administered.url,))
            gone.start()
            gone.join()
            answers: list[str] = []
            waiter = threading.Thread(target=lambda: answers.append(administered.ask("Hello", max_tokens=2)[0]))
            waiter.start()
            until(lambda: administered.get("status")["waiting_requests"] >= 1)
            assert not answers
            assert stream.headers["x-bimedix-checkpoint"] == BASE
            assert [line for line in lines if line][-1] == "data: [DONE]"
        *_, (_, report) = first
        waiter.join(PATIENCE)
    assert report["result"] == "activated"
    assert report["waited_requests"] == 2
    assert answers == [TWIN]
    results = [(one["what"], one["checkpoint"], one["result"]) for one in administered.get("audit?limit=2")["data"]]
    assert sorted(results) == [("activate", "noise", "refused"), ("activate", TWIN, "activated")]


def give_up(url: str) -> None:
    """A client that leaves while it waits."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hello"}]},
            timeout=httpx.Timeout(PATIENCE, read=0.5),
        )


def test_without_its_database_nothing_is_activated(administered: Administered) -> None:
    """The database goes away between the gate and the commit, as a file that someone else keeps locked."""
    administered.serve(BASE)
    other = sqlite3.connect(administered.running.store.removeprefix("sqlite:///"), isolation_level=None)
    report: dict[str, Any] = {}
    try:
        for name, event in administered.follow(f"checkpoints/{TWIN}/activate"):
            if event.get("phase") == "prepare":
                other.execute("BEGIN IMMEDIATE")
            if event.get("phase") == "restore":
                other.execute("ROLLBACK")
            report = event if name == "report" else report
        other.execute("BEGIN IMMEDIATE")
        refused = httpx.post(
            f"{administered.url}/admin/checkpoints/{TWIN}/activate", headers=headers(), json={}, timeout=PATIENCE
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert administered.ask("Hello", max_tokens=2)[0] == BASE
    finally:
        other.close()
    assert report["result"] == "rolled_back"
    assert "the database did not confirm" in report["message"]
    assert administered.get("status")["desired"] == BASE


# --- who may ------------------------------------------------------------------------------------------------------

PATHS = [
    ("GET", "checkpoints"), ("GET", f"checkpoints/{TWIN}"), ("POST", f"checkpoints/{TWIN}/activate"),
    ("POST", "promote"), ("POST", "abort"), ("GET", "status"), ("GET", "audit"),
    ("GET", "adapters"), ("PUT", "adapters/x"), ("DELETE", "adapters/x"),
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {"POST": {}, "PUT": {}}


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_only_administrators_may(administered: Administered, method: str, path: str) -> None:
    for authorization in ({}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {ADMIN}x"}):
        response = httpx.request(
            method,
            f"{administered.url}/admin/{path}",
            headers=authorization,
            json=BODIES.get(method),
        )
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (f"checkpoints/{TWIN}/activate", {"share": 1.5}, 400),
        (f"checkpoints/{TWIN}/activate", {"share": "much"}, 400),
        (f"checkpoints/{TWIN}/activate", {"chair": 0.5}, 400),
        (f"checkpoints/{TWIN}/activate", {"share": 0.5}, 409),
        ("promote", {}, 409),
        ("abort", {}, 409),
    ],
)
def test_what_cannot_be_done_says_why(administered: Administered, path: str, body: dict[str, Any], status: int) -> None:
    response = httpx.post(f"{administered.url}/admin/{path}", headers=headers(), json=body, timeout=PATIENCE)
    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_admin_keys_there_is_no_administration(service: Any, method: str, path: str) -> None:
    response = httpx.request(method, f"{service.url}/admin/{path}", headers=headers(), json=BODIES.get(method))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "admin_off")
