"""Conversations and their items through the official client."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.conversations import Message
from openai.types.responses import EasyInputMessageParam

from tests.conftest import RunningService

SECRET = "the patient's secret"


def says(text: str, role: Any = "user") -> EasyInputMessageParam:
    return {"type": "message", "role": role, "content": text}


def texts(client: openai.OpenAI, conversation: str, **fields: Any) -> list[str]:
    items = client.conversations.items.list(conversation, **{"order": "asc", "limit": 100, **fields})
    return [text_of(item) for item in items]


def text_of(item: object) -> str:
    assert isinstance(item, Message)
    (part,) = item.content
    return part.text  # type: ignore[union-attr]


def test_a_conversation_is_made_read_changed_and_deleted(client: openai.OpenAI) -> None:
    made = client.conversations.create(metadata={"topic": "asthma"})
    assert made.id.startswith("conv_") and made.object == "conversation"
    assert abs(made.created_at - time.time()) < 600
    assert client.conversations.retrieve(made.id) == made
    changed = client.conversations.update(made.id, metadata={"topic": "fever"})
    assert changed.metadata == {"topic": "fever"}
    deleted = client.conversations.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError) as refused:
        client.conversations.retrieve(made.id)
    assert refused.value.code == "not_found"


def test_items_are_added_listed_by_pages_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.conversations.create(items=[says("Be brief.", "system"), says("مرحبا")])
    added = client.conversations.items.create(made.id, items=[says("Hello", "assistant"), says("a"), says("b")])
    assert [text_of(item) for item in added.data] == ["Hello", "a", "b"]
    assert (added.first_id, added.last_id, added.has_more) == (added.data[0].id, added.data[-1].id, False)
    assert texts(client, made.id) == ["Be brief.", "مرحبا", "Hello", "a", "b"]
    assert texts(client, made.id, order="desc", limit=2) == ["b", "a", "Hello", "مرحبا", "Be brief."]
    page = client.conversations.items.list(made.id, order="asc", limit=2)
    assert page.has_more and page.last_id == page.data[-1].id
    hello = client.conversations.items.retrieve(added.first_id, conversation_id=made.id)
    assert isinstance(hello, Message)
    assert (hello.role, hello.status, hello.content[0].type) == ("assistant", "completed", "output_text")
    assert client.conversations.items.delete(hello.id, conversation_id=made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(hello.id, conversation_id=made.id)
    assert texts(client, made.id, after=added.data[1].id) == ["b"]


def test_an_empty_conversation_has_no_items(client: openai.OpenAI) -> None:
    assert texts(client, client.conversations.create().id) == []


def test_a_conversation_lives_as_long_as_it_is_told(client: openai.OpenAI) -> None:
    expiry = {"expires_after": {"anchor": "last_active_at", "seconds": 1}}
    made = client.conversations.create(extra_body=expiry)
    assert (made.model_extra or {})["expires_at"] == pytest.approx(made.created_at + 1, abs=1)
    time.sleep(1.1)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)


def test_the_same_key_makes_one_conversation(client: openai.OpenAI) -> None:
    key = {"Idempotency-Key": f"make-{time.time_ns()}"}
    first = client.conversations.create(metadata={"n": "1"}, extra_headers=key)
    assert client.conversations.create(metadata={"n": "1"}, extra_headers=key) == first
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.conversations.create(metadata={"n": "2"}, extra_headers=key)
    assert refused.value.code == "idempotency_key_reused"
    adding = {"Idempotency-Key": f"add-{time.time_ns()}"}
    for _ in range(2):
        client.conversations.items.create(first.id, items=[says("a")], extra_headers=adding)
    assert texts(client, first.id) == ["a"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ("", {"metadata": {"k": "x" * 513}}, "metadata"),
        ("", {"metadata": {"k": 1}}, "metadata"),
        ("", {"metadata": "x"}, "metadata"),
        ("", {"items": [says("x")] * 21}, "items"),
        ("", {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items"),
        ("", {"items": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "items"),
        ("", {"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after"),
        ("", {"surprise": 1}, "surprise"),
        ("/items", {"items": []}, "items"),
        ("/items", {}, "items"),
    ],
)
def test_impossible_bodies_are_refused(service: RunningService, path: str, body: dict[str, Any], param: str) -> None:
    where = f"{service.url}/v1/conversations"
    if path:
        where += f"/{service.client().conversations.create().id}{path}"
    answer = httpx.post(where, json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"order": "up"}, {"limit": "many"}])
def test_impossible_pages_are_refused(service: RunningService, query: dict[str, Any]) -> None:
    made = service.client().conversations.create()
    answer = httpx.get(f"{service.url}/v1/conversations/{made.id}/items", params=query, timeout=60)
    assert answer.status_code == 400


@pytest.mark.parametrize("name", ["conv_1", "conv_" + "0" * 48, "%00", "conv_%F0%9F%98%80", "x" * 5000])
def test_unknown_names_are_not_found(service: RunningService, name: str) -> None:
    for path in (f"conversations/{name}", f"conversations/{name}/items", f"responses/{name}"):
        answer = httpx.get(f"{service.url}/v1/{path}", timeout=60)
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] == "not_found"


def test_what_people_write_is_in_no_log_metric_or_error(service: RunningService) -> None:
    client = service.client()
    made = client.conversations.create(metadata={"k": SECRET}, items=[says(SECRET)])
    answer = client.responses.create(input=SECRET, instructions=SECRET, conversation=made.id, max_output_tokens=2)
    client.responses.retrieve(answer.id)
    bodies: list[dict[str, Any]] = [
        {"input": SECRET, "temperature": 9, "metadata": {"k": SECRET}},
        {"input": [{"role": SECRET, "content": SECRET}]},
        {"input": SECRET, "text": {"format": {"type": "json_schema", "name": SECRET, "schema": {"$ref": SECRET}}}},
        {"input": SECRET, "conversation": SECRET},
        {"input": SECRET * 5000, "truncation": "disabled"},
    ]
    for body in bodies:
        refused = httpx.post(f"{service.url}/v1/responses", json=body, timeout=60)
        assert 400 <= refused.status_code < 500, refused.text
        assert SECRET not in refused.text
    assert SECRET not in service.log.read_text()
    assert SECRET not in httpx.get(f"{service.url}/metrics", timeout=60).text


@pytest.mark.parametrize(("schema", "remedy"), [("0000", "bimedix conversations migrate"), ("9999", "newer")])
def test_a_store_of_another_version_is_refused_with_what_to_run(tmp_path: Path, schema: str, remedy: str) -> None:
    path = tmp_path / "c.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE conversations_schema (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO conversations_schema VALUES (?)", (schema,))
    database.close()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--store", f"sqlite:///{path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    assert remedy in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "reason"), [(["--store", "mysql://h/d"], "the store is a URL"), (["--conversation-ttl", "soon"], "30d")]
)
def test_impossible_settings_end_at_once(flags: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr
