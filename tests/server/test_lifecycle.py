"""Loading, keys and shutting down, on a service of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from tests.conftest import RunningService, start_service

KEY = "a-key-for-the-tests-0001"
OTHER = "a-key-for-the-tests-0002"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with two keys, still loading."""
    directory = tmp_path_factory.mktemp("keyed")
    (directory / "keys").write_text(f"# for tests\nother:{OTHER}\n")
    running = start_service(
        directory, "--api-key-file", str(directory / "keys"), "--drain-seconds", "20", BIMEDIX_API_KEYS=f"app:{KEY}"
    )
    yield running
    running.stop()


def test_alive_but_not_ready_while_loading(keyed: RunningService) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            assert httpx.get(f"{keyed.url}/health", timeout=30).status_code == 200
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline, keyed.log.read_text()
            time.sleep(0.1)
    response = httpx.get(f"{keyed.url}/ready", timeout=30)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "loading"
    assert int(response.headers["retry-after"]) > 0
    with pytest.raises(openai.InternalServerError) as refused:
        keyed.client(KEY).models.list()
    assert refused.value.status_code == 503


def test_start_says_what_loads_and_where(keyed: RunningService) -> None:
    keyed.wait_until_ready()
    log = keyed.log.read_text()
    assert "demonstration" in log.lower()
    assert keyed.url in log
    assert KEY not in log


@pytest.mark.parametrize("key", ["wrong-key-for-the-tests", KEY[:-1], KEY + "0", "ключ", "x"])
def test_wrong_keys_are_refused(keyed: RunningService, key: str) -> None:
    keyed.wait_until_ready()
    headers = [(b"Authorization", f"Bearer {key}".encode())]
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
        body = {"model": "bimedix", "messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello"}
        response = httpx.request(method, keyed.url + path, headers=headers, json=body if method == "POST" else None)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_right_keys_are_served(keyed: RunningService, key: str) -> None:
    keyed.wait_until_ready()
    assert keyed.client(key).models.list().data


def test_conversations_are_visible_to_their_own_key_only(keyed: RunningService) -> None:
    """Somebody else's id is answered exactly as an id of nothing is."""
    keyed.wait_until_ready()
    mine, theirs = keyed.client(KEY), keyed.client(OTHER)
    made = mine.conversations.create(items=[{"type": "message", "role": "user", "content": "Hello"}])
    answer = mine.responses.create(input="Hello", conversation=made.id, max_output_tokens=2)
    (item, *_) = mine.conversations.items.list(made.id)
    nothing = made.id[:-1] + ("0" if made.id[-1] != "0" else "1")
    attempts: list[Callable[[str, str], object]] = [
        lambda name, _: theirs.conversations.retrieve(name),
        lambda name, _: theirs.conversations.update(name, metadata={}),
        lambda name, _: theirs.conversations.delete(name),
        lambda name, _: theirs.conversations.items.list(name),
        lambda name, _: theirs.conversations.items.retrieve(str(item.id), conversation_id=name),
        lambda name, _: theirs.conversations.items.delete(str(item.id), conversation_id=name),
        lambda name, _: theirs.responses.create(input="Hello", conversation=name, max_output_tokens=2),
        lambda _, name: theirs.responses.create(input="Hello", previous_response_id=name, max_output_tokens=2),
        lambda _, name: theirs.responses.retrieve(name),
        lambda _, name: theirs.responses.delete(name),
        lambda _, name: theirs.responses.input_items.list(name),
        lambda _, name: theirs.responses.cancel(name),
    ]
    for attempt in attempts:
        refusals = []
        for names in ((made.id, answer.id), (nothing, "resp_" + "0" * 48)):
            with pytest.raises(openai.NotFoundError) as refused:
                attempt(*names)
            refusals.append(refused.value.response.text)
        assert refusals[0] == refusals[1]
    assert mine.responses.retrieve(answer.id) == answer
    with pytest.raises(openai.AuthenticationError):
        keyed.client("wrong-key-for-the-tests").conversations.retrieve(made.id)


def test_probes_and_metrics_need_no_key(keyed: RunningService) -> None:
    keyed.wait_until_ready()
    for path in ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"):
        assert httpx.get(keyed.url + path, timeout=30).status_code == 200, path


def test_docs_load_nothing_from_elsewhere(keyed: RunningService) -> None:
    keyed.wait_until_ready()
    page = httpx.get(f"{keyed.url}/docs").text
    assert "http://" not in page and "https://" not in page
    assert httpx.get(f"{keyed.url}/docs/static/swagger-ui-bundle.js").status_code == 200


def test_sigterm_lets_streams_finish_and_takes_no_more(keyed: RunningService) -> None:
    """Last in this module: it ends the service."""
    keyed.wait_until_ready()
    client = keyed.client(KEY)
    stream = client.chat.completions.create(
        model="bimedix",
        messages=[{"role": "user", "content": "What is asthma?"}],
        stream=True,
        max_tokens=1500,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    keyed.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (ready := httpx.get(f"{keyed.url}/ready", timeout=10)).status_code != 503 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ready.json()["error"]["code"] == "shutting_down"
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="bimedix", messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"]
    finish_reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finish_reasons[-1] == "length"
    keyed.process.wait(30)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--host", "0.0.0.0"], "without API keys"),
        (["--port", "99999"], "--port"),
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["stray"], "--model"),
        (["--api-key-file", "/no/such/file"], "API key file"),
        (["--max-num-seqs", "many"], "max-num-seqs"),
        (["--model", "/no/such/directory"], "/no/such/directory"),
    ],
)
def test_bad_flags_end_at_once_with_what_to_change(flags: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "--tensor-parallel-size 2" in ended.stdout
