"""Chat completions with `conversation`: the same stored state, spoken as chat."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.conftest import RunningService
from tests.server.test_chat import says
from tests.server.test_conversations import texts


def chat(client: openai.OpenAI, conversation: str, text: str, **fields: Any) -> Any:
    given = {"max_tokens": 6, "temperature": 0, "extra_body": {"conversation": conversation}, **fields}
    return client.chat.completions.create(model="bimedix", messages=says(text), **given)


def spoken(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def test_chat_and_responses_share_a_conversation(client: openai.OpenAI) -> None:
    made = client.conversations.create()
    first = chat(client, made.id, "What is asthma?")
    second = client.responses.create(input="And why?", conversation=made.id, max_output_tokens=6)
    third = chat(client, made.id, "وما العلاج؟")
    assert texts(client, made.id) == [
        "What is asthma?", spoken(first), "And why?", second.output_text, "وما العلاج؟", spoken(third),
    ]  # fmt: skip
    assert third.usage.prompt_tokens > first.usage.total_tokens
    assert third.usage.prompt_tokens_details is not None


def test_a_chat_without_a_conversation_leaves_nothing_behind(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="bimedix", messages=says("Hello"), max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id.removeprefix("chatcmpl-"))


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_streamed_turn_is_committed_before_its_finish_reason_is_sent(
    service: RunningService, with_usage: bool
) -> None:
    client = service.client()
    made = client.conversations.create()
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    deltas, usages, finished = [], 0, 0
    for chunk in chat(client, made.id, "What is asthma?", stream=True, **options):
        usages += chunk.usage is not None
        for choice in chunk.choices:
            deltas.append(choice.delta.content or "")
            if choice.finish_reason:
                finished += 1
                assert texts(client, made.id) == ["What is asthma?", "".join(deltas)]
    assert (finished, usages) == (1, int(with_usage))


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_key_returns_the_first_result(service: RunningService, stream: bool) -> None:
    client = service.client()
    made = client.conversations.create()
    once = {"Idempotency-Key": f"chat-{time.time_ns()}"}
    results = []
    for _ in range(2):
        answer = chat(client, made.id, "What is asthma?", stream=stream, extra_headers=once)
        if stream:
            chunks = list(answer)
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            results.append((chunks[0].id, text, [c.finish_reason for chunk in chunks for c in chunk.choices][-1]))
        else:
            results.append((answer.id, spoken(answer), answer.choices[0].finish_reason, answer.usage, answer.created))
    assert results[0] == results[1]
    assert len(texts(client, made.id)) == 2


def test_a_system_message_with_every_turn_counts_once(client: openai.OpenAI) -> None:
    made = client.conversations.create()
    tokens = []
    for _ in range(3):
        answer = client.chat.completions.create(
            model="bimedix",
            messages=[{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Hello"}],
            max_tokens=1,
            extra_body={"conversation": made.id, "ignore_eos": True},
        )
        assert answer.usage is not None
        tokens.append(answer.usage.prompt_tokens)
    assert tokens[2] - tokens[1] == tokens[1] - tokens[0] < 40


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 2}, 400),
        ({"conversation": "conv_" + "0" * 48}, 404),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400),
    ],
)
def test_impossible_turns_are_refused(service: RunningService, fields: dict[str, Any], status: int) -> None:
    made = service.client().conversations.create()
    body = {"model": "bimedix", "messages": says("x"), "conversation": made.id, "max_tokens": 1, **fields}
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert texts(service.client(), made.id) == []
