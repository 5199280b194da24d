"""Turns through the official client's Responses API: stored, streamed, cut off, repeated, raced for."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from server.conversations.store import Store
from server.conversations.values import Message, RunningTurn
from tests.conftest import RunningService
from tests.server.test_conversations import says, texts

EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
LONG = {"max_output_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
QUESTION = "What is asthma?"
YES_OR_NO: dict[str, Any] = {
    "format": {"type": "json_schema", "name": "urgent", "schema": {"type": "string", "enum": ["yes", "no"]}}
}
"""A form that any model can fill in a few tokens, and then it has ended."""


def ask(client: openai.OpenAI, text: Any = QUESTION, **fields: Any) -> Response:
    answer = client.responses.create(input=text, **{"max_output_tokens": 8, "temperature": 0, **fields})
    assert isinstance(answer, Response)
    return answer


def key() -> dict[str, str]:
    return {"Idempotency-Key": f"key-{time.time_ns()}"}


# --- one turn ---------------------------------------------------------------------------------------------------


def test_a_response_is_kept_until_it_is_deleted(client: openai.OpenAI) -> None:
    answer = ask(client, metadata={"k": "v"}, instructions="Be brief.", top_p=0.9)
    assert answer.id.startswith("resp_") and answer.object == "response"
    assert answer.output_text
    assert answer.metadata == {"k": "v"}
    assert (answer.instructions, answer.temperature, answer.top_p, answer.max_output_tokens) == ("Be brief.", 0, 0.9, 8)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert client.responses.retrieve(answer.id) == answer
    (item,) = client.responses.input_items.list(answer.id)
    assert item.type == "message" and item.content[0].text == QUESTION  # type: ignore[union-attr]
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_a_reply_cut_by_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    cut = ask(client, max_output_tokens=3, extra_body={"ignore_eos": True})
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert client.responses.retrieve(cut.id) == cut


def test_a_reply_that_ends_is_completed(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, text=YES_OR_NO)  # type: ignore[call-overload]
    assert whole.status == "completed"
    assert whole.incomplete_details is None
    assert json.loads(whole.output_text) in ("yes", "no")


@pytest.mark.parametrize(("limit", "status"), [(60, "completed"), (2, "incomplete")])
def test_a_stream_is_openais_events_and_committed_before_the_last(
    service: RunningService, limit: int, status: str
) -> None:
    client = service.client()
    stream = client.responses.create(
        input=QUESTION,
        stream=True,
        max_output_tokens=limit,
        text=YES_OR_NO,  # type: ignore[misc]
    )
    kinds, deltas, numbers = [], [], []
    for event in stream:
        numbers.append(event.sequence_number)
        if not kinds or kinds[-1] != event.type:
            kinds.append(event.type)
        if event.type == "response.output_text.delta":
            deltas.append(event.delta)
        if event.type == f"response.{status}":
            # The stream is still open: whoever has read this event finds the response stored.
            kept = client.responses.retrieve(event.response.id)
            assert kept == event.response
            assert kept.output_text == "".join(deltas)
    assert kinds == [*EVENTS, f"response.{status}"]
    assert numbers == list(range(len(numbers)))


def test_the_clients_own_stream_helper_understands(client: openai.OpenAI) -> None:
    with client.responses.stream(model="bimedix", input="ما أعراض الربو؟", text=YES_OR_NO) as stream:  # type: ignore[arg-type]
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == "".join(deltas)


def test_headers_name_language_and_checkpoint(service: RunningService) -> None:
    for stream in (False, True):
        body = {"input": "ما أعراض الربو؟", "max_output_tokens": 2, "stream": stream}
        answer = httpx.post(f"{service.url}/v1/responses", json=body, timeout=60)
        assert answer.headers["x-bimedix-language"] == "ar"
        assert answer.headers["x-bimedix-checkpoint"]


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    answer = ask(client, store=False)
    assert answer.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    kept = ask(client)
    assert ask(client, "And why?", store=False, previous_response_id=kept.id).previous_response_id == kept.id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1", "store": False}, "store"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [says("x", "assistant")]}, "input"),
        ({"input": [says("x", "critic")]}, "input"),
        ({"input": "x " * 9000, "truncation": "disabled"}, "input"),
        ({"input": "x " * 9000}, "input"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#"}}}}, "text"),
    ],
)
def test_impossible_requests_are_refused(service: RunningService, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{service.url}/v1/responses", json={"input": "x", **fields}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_nothing_can_be_cancelled(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(ask(client).id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_" + "0" * 48)


# --- conversations ----------------------------------------------------------------------------------------------


def test_turns_of_a_conversation_and_a_language_switch(client: openai.OpenAI) -> None:
    made = client.conversations.create(items=[says("Be brief.", "system")])
    first = ask(client, "What is high blood pressure?", conversation=made.id)
    second = ask(client, "وما أعراضه؟", conversation={"id": made.id})
    assert first.conversation is not None and second.conversation is not None
    assert first.conversation.id == second.conversation.id == made.id
    assert texts(client, made.id) == [
        "Be brief.", "What is high blood pressure?", first.output_text, "وما أعراضه؟", second.output_text,
    ]  # fmt: skip
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_each_prompt_finds_the_one_before_in_the_prefix_cache(client: openai.OpenAI) -> None:
    made = client.conversations.create(metadata={"n": str(time.time_ns())})
    words = " ".join(f"symptom {n} of {time.time_ns()}" for n in range(20))
    cached, asked = [], []
    for question in (words, "وما العلاج؟", "And the side effects?", "شكرا", "ok"):
        usage = ask(client, question, conversation=made.id).usage
        assert usage is not None
        cached.append(usage.input_tokens_details.cached_tokens)
        asked.append(usage.input_tokens)
    assert asked == sorted(asked)
    # Whole blocks only: all but the last block of the prompt before.
    for before, hit in zip(asked, cached[1:], strict=False):
        assert hit >= before - 128, (asked, cached)


def test_responses_follow_one_another(client: openai.OpenAI) -> None:
    first = ask(client)
    second = ask(client, "And why?", previous_response_id=first.id)
    branch = ask(client, "And how?", previous_response_id=first.id)
    assert second.previous_response_id == branch.previous_response_id == first.id
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        ask(client, previous_response_id="resp_" + "0" * 48)


def test_instructions_hold_for_one_response(client: openai.OpenAI) -> None:
    first = ask(client, instructions="Be as brief as you possibly can, and then a little briefer still.")
    second = ask(client, "And why?", previous_response_id=first.id)
    assert second.instructions is None


def test_the_oldest_turns_drop_out_of_a_full_window(service: RunningService) -> None:
    client = service.client()
    made = client.conversations.create()
    for n in range(6):
        raw = client.responses.with_raw_response.create(
            input=f"Question {n}: " + "a pain in the chest " * 80, conversation=made.id, max_output_tokens=4
        )
    last = raw.parse()
    dropped = int((last.metadata or {})["bimedix_dropped_turns"])
    assert 0 < dropped < 6
    assert raw.headers["x-bimedix-dropped-turns"] == str(dropped)
    assert len(texts(client, made.id)) == 12
    assert client.responses.retrieve(last.id).metadata == last.metadata
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "And now?", conversation=made.id, truncation="disabled")
    assert refused.value.code == "context_length_exceeded"
    assert len(texts(client, made.id)) == 12, "a turn that was refused is no part of the conversation"


# --- broken, raced for, repeated --------------------------------------------------------------------------------


def test_a_broken_stream_leaves_what_was_sent_and_frees_the_conversation(service: RunningService) -> None:
    client = service.client()
    made = client.conversations.create()
    seen: list[str] = []
    with client.responses.create(input=QUESTION, conversation=made.id, stream=True, **LONG) as stream:  # type: ignore[call-overload]
        for event in stream:
            if event.type == "response.created":
                name = event.response.id
            if event.type == "response.output_text.delta":
                seen.append(event.delta)
                if len(seen) == 5:
                    break
    ask(client, "Are you there?", conversation=made.id)
    broken = client.responses.retrieve(name)
    assert broken.status == "incomplete"
    assert broken.output_text.startswith("".join(seen))
    whole = ask(client, **LONG)
    assert whole.output_text.startswith(broken.output_text)
    assert len(broken.output_text) < len(whole.output_text)


def test_two_clients_on_one_conversation_take_turns(service: RunningService) -> None:
    client = service.client()
    clients = [service.client(), service.client()]
    made = client.conversations.create()
    waited = []

    def talk(n: int) -> Response:
        raw = clients[n % 2].responses.with_raw_response.create(
            input=f"{n}?", conversation=made.id, max_output_tokens=30, extra_body={"ignore_eos": True}
        )
        waited.append(float(raw.headers.get("x-bimedix-waited-seconds", 0)))
        return raw.parse()

    answers: list[Response] = []
    with ThreadPoolExecutor(2) as pool:
        # On a busy machine the two may miss each other once, but not ten times.
        while not any(waited) and len(answers) < 20:
            answers += pool.map(talk, (len(answers), len(answers) + 1))
    found = texts(client, made.id)
    assert sorted(found[::2]) == sorted(f"{n}?" for n in range(len(answers)))
    assert found[1::2] == [answers[int(question[:-1])].output_text for question in found[::2]]
    assert max(waited) > 0


def test_who_waits_too_long_is_told(service: RunningService) -> None:
    """The conversation is held by another process on the same store."""
    client = service.client()
    made = client.conversations.create()
    held, release = threading.Event(), threading.Event()

    async def hold() -> None:
        async with Store(service.store) as store:
            turn = await store.begin_turn("anonymous", [Message("human", "first")], conversation_id=made.id)
            assert isinstance(turn, RunningTurn)
            held.set()
            await asyncio.to_thread(release.wait)
            await store.finish_turn(turn, "done")

    holder = threading.Thread(target=lambda: asyncio.run(hold()))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(openai.ConflictError, match=r"waited [5-9]") as refused:
            ask(client, "second", conversation=made.id)
        assert refused.value.code == "conversation_busy"
        with pytest.raises(openai.ConflictError):
            client.conversations.items.create(made.id, items=[says("third")])
    finally:
        release.set()
        holder.join()
    assert texts(client, made.id) == ["first", "done"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_repeated_key_returns_the_first_result(service: RunningService, first: bool, again: bool) -> None:
    client = service.client()
    made = client.conversations.create()
    once = key()
    if first != again:
        # The body differs in `stream`, so it is another request.
        result = turn(client, made.id, once, first)
        with pytest.raises(openai.UnprocessableEntityError):
            turn(client, made.id, once, again)
    else:
        result = turn(client, made.id, once, first)
        assert turn(client, made.id, once, again) == result
    assert texts(client, made.id) == [QUESTION, result.output_text]


def turn(client: openai.OpenAI, conversation: str, once: dict[str, str], stream: bool) -> Response:
    """One turn; of a stream, what its last event says."""
    fields: dict[str, Any] = {"conversation": conversation, "max_output_tokens": 5, "extra_headers": once}
    if not stream:
        return client.responses.create(input=QUESTION, **fields)  # type: ignore[no-any-return]
    *_, last = client.responses.create(input=QUESTION, stream=True, **fields)
    return last.response  # type: ignore[no-any-return]


def test_a_key_repeated_at_the_same_time_makes_one_turn(service: RunningService) -> None:
    made = service.client().conversations.create()
    once = key()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: turn(service.client(), made.id, once, False), range(4)))
    assert len({result.id for result in results}) == 1
    assert len(texts(service.client(), made.id)) == 2


def test_a_key_without_a_store_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="store=true"):
        ask(client, store=False, extra_headers=key())


def test_turns_are_counted(service: RunningService) -> None:
    def count(ending: str) -> float:
        metrics = httpx.get(f"{service.url}/metrics", timeout=60).text
        found = re.search(rf'^bimedix_turns_total\{{ending="{ending}"\}} (\S+)', metrics, re.M)
        return float(found[1]) if found else 0.0

    before = count("incomplete")
    ask(service.client(), max_output_tokens=1, extra_body={"ignore_eos": True})
    assert count("incomplete") == before + 1
