"""Export: Vicuna records that `server.vicuna` and training read, whole exchanges only."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.conversations.cli import app
from server.conversations.export import to_record
from server.conversations.store import Store
from server.conversations.values import Item, Message, Turn
from server.vicuna import from_record
from tests.server.conversations.conftest import OWNER
from tests.server.conversations.test_store import exchange
from tests.server.conversations.test_turns import begin

pytestmark = pytest.mark.anyio


async def test_complete_turns_are_exported(store: Store) -> None:
    made = await store.create_conversation(OWNER, items=[Message("system", "s"), Message("gpt", "welcome")])
    await exchange(store, made.id, "q1", "a1")
    broken = await begin(store, "q2", conversation_id=made.id)
    broken.sent("a2, bro")
    await store.interrupt_turn(broken)
    await exchange(store, made.id, "q3", "a3")
    await store.add_items(OWNER, made.id, [Message("human", "q4")])
    await store.create_conversation(OWNER, items=[Message("human", "unanswered")])
    first = await exchange(store, None, "one", "1")
    await exchange(store, None, "two", "2", previous_response_id=first)
    await exchange(store, None, "three", "3", previous_response_id=first)
    found = [[turn["value"] for turn in record["conversations"]] async for record in store.export()]
    assert found == [["s", "q1", "a1", "q3", "a3"], ["one", "1", "two", "2"], ["one", "1", "three", "3"]]


async def test_export_goes_through_all_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.conversations.export.BATCH", 3)
    for n in range(7):
        made = await store.create_conversation(OWNER)
        await exchange(store, made.id, f"q{n}", "a")
        await exchange(store, None, f"r{n}", "a")
    found = [record["conversations"][0]["value"] async for record in store.export()]
    assert found == [f"q{n}" for n in range(7)] + [f"r{n}" for n in range(7)]


ITEMS = st.lists(
    st.builds(Item, st.just("msg"), st.sampled_from(["system", "human", "gpt"]), st.text(), st.just("completed"))
)


@given(st.lists(st.tuples(ITEMS, st.sampled_from(["complete", "incomplete"]))))
def test_every_record_is_a_valid_one(turns: list[tuple[list[Item], str]]) -> None:
    record = to_record(
        "conv",
        [
            Turn(None, None, status, tuple(items), None, None, None, None, 0.0, 0.0, {}, {})  # type: ignore[arg-type]
            for items, status in turns
        ],
    )
    if record is not None:
        messages = from_record(record)
        assert messages[-1]["role"] == "assistant"


async def test_the_command_line(url: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--store", url])
        assert done.exit_code == 0, done.output
        return done.stdout

    async with Store(url) as store:
        made = await store.create_conversation(OWNER)
        await exchange(store, made.id, "سؤال", "جواب")
    lines = (await asyncio.to_thread(run, "export")).splitlines()
    turns = [{"from": "human", "value": "سؤال"}, {"from": "gpt", "value": "جواب"}]
    assert [json.loads(line) for line in lines] == [{"id": made.id, "conversations": turns}]
    target = tmp_path / "out.jsonl"
    await asyncio.to_thread(run, "export", "--format", "vicuna", "--output", str(target))
    assert target.read_text(encoding="utf-8").splitlines() == lines
    counts = json.loads(await asyncio.to_thread(run, "count", "--json"))
    assert counts == {"conversations": 1, "complete": 1, "incomplete": 0, "failed": 0, "in_progress": 0}
    assert json.loads(await asyncio.to_thread(run, "purge", "--json")) == {"conversations": 0, "responses": 0}
    purged = await asyncio.to_thread(run, "purge", "--older-than", "0s", "--json")
    assert json.loads(purged) == {"conversations": 1, "responses": 0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--store", "sqlite:////nowhere/c.db"],
        ["count", "--store", "mysql://h"],
        ["purge", "--older-than", "1y"],
    ],
)
def test_mistakes_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
