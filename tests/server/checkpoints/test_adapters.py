"""Adapters that come and go while the service runs: on attention, which vLLM applies on a CPU too."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from server.cli import app
from server.settings import EMBEDDED_CHECKPOINT
from tests.conftest import RunningService, start_service
from tests.server.checkpoints.conftest import ADMIN, BASE, PATIENCE, Administered, headers, text
from tests.server.checkpoints.lora import make_adapter
from tests.server.checkpoints.test_activation import until

PROMPT = "What are the symptoms of asthma? My brother has had it since he was a child and asks what to do about it."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that answer differently, and some that cannot be applied here."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        "one": make_adapter(root / "one", 1),
        "two": make_adapter(root / "two", 2),
        "experts": make_adapter(root / "experts", 3, ("w1", "w2", "w3")),
        "large": make_adapter(root / "large", 4, rank=32),
        "empty": root / "empty",
    }
    made["empty"].mkdir()
    return made


def start(directory: Path, store: str, *flags: str) -> RunningService:
    return start_service(directory, *flags, BIMEDIX_ADMIN_KEYS=f"ops:{ADMIN}", BIMEDIX_STORE=store)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Administered]:
    directory = tmp_path_factory.mktemp("adapted")
    running = start(directory, f"sqlite:///{directory / 'store.db'}", "--adapter", f"cardio={folders['one']}")
    try:
        running.wait_until_ready()
        yield Administered(running)
    finally:
        running.stop()


def put(service: Administered, name: str, directory: Path) -> httpx.Response:
    body = {"directory": str(directory)}
    return httpx.put(f"{service.url}/admin/adapters/{name}", json=body, headers=headers(), timeout=PATIENCE)


def delete(service: Administered, name: str) -> httpx.Response:
    return httpx.delete(f"{service.url}/admin/adapters/{name}", headers=headers(), timeout=PATIENCE)


def names(service: Administered) -> list[str]:
    return [one["name"] for one in service.get("adapters")["data"]]


@pytest.fixture
def skin(adapted: Administered, folders: dict[str, Path]) -> Iterator[str]:
    """A name with the first adapter under it."""
    assert put(adapted, "skin", folders["one"]).status_code == 200
    yield "skin"
    delete(adapted, "skin")


def test_a_configured_adapter_answers_under_its_name(adapted: Administered) -> None:
    base, cardio = adapted.running.client().models.list().data
    assert (base.id, cardio.id) == ("bimedix", "cardio")
    plain_from, plain = adapted.ask(PROMPT)
    adapted_from, reply = adapted.ask(PROMPT, model="cardio")
    assert plain_from == BASE
    assert adapted_from == f"{BASE}+{reply['model']}" == cardio.model_dump()["checkpoint"]
    assert reply["model"].startswith("cardio@")
    assert text(reply) != text(plain)


def test_it_scores_as_peft_does(adapted: Administered, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    sentence = "USER: What is asthma? ASSISTANT: Asthma is a disease of the airways."
    body = {"model": "cardio", "prompt": sentence, "echo": True, "logprobs": 0, "max_tokens": 1}
    answer = httpx.post(f"{adapted.url}/v1/completions", json=body, timeout=PATIENCE).json()
    tokens = tokenizer(sentence, return_tensors="pt")["input_ids"]
    theirs = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1 : tokens.shape[1]])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)

    def scores(scorer: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = scorer(tokens).logits[0, :-1].log_softmax(-1)
        found: torch.Tensor = logits.gather(1, tokens[0, 1:, None])[:, 0]
        return found

    plain = scores(model)
    ours = scores(PeftModel.from_pretrained(model, str(folders["one"])))
    # bfloat16 against float32: far nearer to the adapted model than that is to the plain one.
    assert (theirs - ours).abs().mean() < 0.1 * (plain - ours).abs().mean()


def test_a_name_changes_from_one_content_to_another(adapted: Administered, skin: str, folders: dict[str, Path]) -> None:
    long_enough_to_cache = PROMPT * 8
    adapted.ask(long_enough_to_cache, model=skin)
    first_from, first = adapted.ask(long_enough_to_cache, model=skin)
    report = put(adapted, skin, folders["two"]).json()
    assert (report["result"], report["previous"]) == ("replaced", first["model"])
    second_from, second = adapted.ask(long_enough_to_cache, model=skin)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert not (second["usage"]["prompt_tokens_details"] or {}).get("cached_tokens"), "computed with other weights"
    assert (text(first), first_from) != (text(second), second_from)
    assert put(adapted, skin, folders["two"]).json()["result"] == "unchanged"
    assert put(adapted, skin, folders["one"]).json()["revision"] == first["model"]
    assert adapted.ask(long_enough_to_cache, model=skin)[1]["choices"] == first["choices"]


def test_removal_waits_for_the_last_request(adapted: Administered, skin: str) -> None:
    long = {"model": skin, "max_tokens": 500, "ignore_eos": True}
    whole = text(adapted.ask(PROMPT, **long)[1])
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stream": True, **long}
    removed: list[httpx.Response] = []
    removing = threading.Thread(target=lambda: removed.append(delete(adapted, skin)))
    pieces = []
    with httpx.stream("POST", f"{adapted.url}/v1/chat/completions", json=body, timeout=PATIENCE) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "")
            if len(pieces) == 3:
                removing.start()
    removing.join(PATIENCE)
    assert "".join(pieces) == whole, "the adapter was there to the end"
    (answer,) = removed
    assert answer.json()["result"] == "removed"
    gone = httpx.post(f"{adapted.url}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert skin not in names(adapted)


def test_a_content_that_comes_back_before_its_last_request_ended_stays(
    adapted: Administered, skin: str, folders: dict[str, Path]
) -> None:
    body = {"model": skin, "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{adapted.url}/v1/completions", json=body, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert put(adapted, skin, folders["two"]).json()["result"] == "replaced"
        assert put(adapted, skin, folders["one"]).json()["result"] == "replaced"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    until(lambda: not any(one["requests"] for one in adapted.get("adapters")["data"]))
    for _ in range(5):
        time.sleep(0.05)  # longer than an unused adapter stays
        adapted.ask(PROMPT, model=skin, max_tokens=1)


def test_a_conversation_says_which_adapter_answered(adapted: Administered) -> None:
    client = adapted.running.client()
    kept = client.conversations.create()
    asked: Any = [{"role": "user", "content": PROMPT}]
    reply = client.chat.completions.with_raw_response.create(
        model="cardio", messages=asked, extra_body={"conversation": kept.id}
    )
    assert reply.headers["x-bimedix-checkpoint"].startswith(f"{BASE}+cardio@")
    following = client.chat.completions.create(model="cardio", messages=asked, extra_body={"conversation": kept.id})
    assert following.choices[0].message.content


@pytest.mark.parametrize(
    ("name", "directory", "status", "reason"),
    [
        ("skin", "experts", 422, "bimedix-train merge"),
        ("skin", "large", 422, "--max-lora-rank 32"),
        ("skin", "empty", 422, "not there as a file"),
        ("bimedix", "two", 422, "name of the model"),
        ("a@b", "two", 422, "no name for an adapter"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    adapted: Administered, folders: dict[str, Path], name: str, directory: str, status: int, reason: str
) -> None:
    before = adapted.get("adapters")
    answer = put(adapted, name, folders[directory])
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "adapter_invalid")
    assert reason in answer.json()["error"]["message"]
    assert adapted.get("adapters") == before
    adapted.ask(PROMPT, model="cardio", max_tokens=1)


def test_bad_requests_are_refused(adapted: Administered) -> None:
    assert put(adapted, "skin", Path("relative")).json()["error"]["param"] == "directory"
    assert delete(adapted, "nobody").json()["error"]["code"] == "adapter_not_found"
    assert httpx.get(f"{adapted.url}/admin/adapters", timeout=PATIENCE).status_code == 401
    off = httpx.get(f"{adapted.url}/admin/checkpoints", headers=headers(), timeout=PATIENCE)
    assert off.json()["error"]["code"] == "registry_off"


def test_a_service_without_adapters_says_so(administered: Administered) -> None:
    off = httpx.get(f"{administered.url}/admin/adapters", headers=headers(), timeout=PATIENCE)
    assert (off.status_code, off.json()["error"]["code"]) == (404, "adapters_off")


def test_the_command_line_and_the_audit_log(adapted: Administered, folders: dict[str, Path]) -> None:
    def run(*arguments: str) -> str:
        given = ["adapters", *arguments, "--url", adapted.url, "--admin-key", ADMIN]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert run("add", "eyes", str(folders["two"])).startswith("added: eyes@")
    assert "eyes  eyes@" in run("list")
    assert run("remove", "eyes").startswith("removed: eyes@")
    removed, added = adapted.get("audit?limit=2")["data"]
    assert [(one["who"], one["what"], one["checkpoint"], one["result"]) for one in (added, removed)] == [
        ("ops", "add adapter", "eyes", "added"),
        ("ops", "remove adapter", "eyes", "removed"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_replicas_agree_also_when_they_start_later(folders: dict[str, Path], tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    flags = ("--enable-lora", "--max-lora-rank", "8")
    first = Administered(start(tmp_path / "first", store, "--adapter", f"cardio={folders['one']}"))
    second = Administered(start(tmp_path / "second", store, *flags))
    try:
        first.running.wait_until_ready()
        second.running.wait_until_ready()
        assert put(first, "skin", folders["two"]).status_code == 200
        wait_for(second, ["skin"])
        assert first.ask(PROMPT, model="skin")[0] == second.ask(PROMPT, model="skin")[0]
        assert delete(first, "cardio").status_code == 200
        first.running.stop()
        again = Administered(start(tmp_path / "first", store, "--adapter", f"cardio={folders['one']}"))
        try:
            again.running.wait_until_ready()
            assert names(again) == ["skin"], "what was removed stays removed, what was added is there"
            assert delete(again, "skin").status_code == 200
            wait_for(second, [])
        finally:
            again.running.stop()
    finally:
        first.running.stop()
        second.running.stop()


def wait_for(service: Administered, wanted: list[str]) -> None:
    until(lambda: names(service) == wanted)
