"""The guard on the real engine, per request: replies in the other language than the question's, whatever it weighs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server.language.score import judge
from server.language.trial import QUESTIONS

GUARD: dict[str, Any] = {"language_policy": "guard"}
ENGLISH, ARABIC = QUESTIONS[1]["en"].format("asthma"), QUESTIONS[1]["ar"].format("الربو")


def ask(client: openai.OpenAI, question: str, **fields: Any) -> Any:
    fields = {"max_tokens": 60, "temperature": 1.0, "seed": 3, **fields}
    return client.chat.completions.create(model="bimedix", messages=[{"role": "user", "content": question}], **fields)


@pytest.mark.parametrize(("question", "language"), [(ENGLISH, "ar"), (ARABIC, "en"), (ENGLISH, "en"), (ARABIC, "ar")])
def test_every_choice_keeps_the_language(client: openai.OpenAI, question: str, language: Any) -> None:
    answer = ask(client, question, n=4, extra_body={**GUARD, "language": language})
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(texts) == 4
    for text in texts:
        assert text and "\ufffd" not in text.removesuffix("\ufffd")
        assert judge(text, language).lines is not False, text


def test_streams_keep_it_too(client: openai.OpenAI) -> None:
    stream = ask(client, ENGLISH, stream=True, extra_body={**GUARD, "language": "ar"})
    assert judge("".join(chunk.choices[0].delta.content or "" for chunk in stream), "ar").lines is not False


def test_guarded_and_unguarded_requests_share_a_batch(client: openai.OpenAI) -> None:
    def reply(number: int) -> tuple[str, str]:
        policy, language = ("guard", "off")[number % 2], ("ar", "en")[number // 2 % 2]
        body = {"language_policy": policy, "language": language}
        content = ask(client, f"{ENGLISH} ({number // 4})", temperature=0, extra_body=body).choices[0].message.content
        return language if policy == "guard" else "", content

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(reply, range(24)))
    assert all(judge(text, language).lines is not False for language, text in together if language)  # type: ignore[arg-type]


def test_a_prescribed_form_is_left_alone(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"urgent": {"type": "boolean"}}, "required": ["urgent"]}
    form = {"type": "json_schema", "json_schema": {"name": "triage", "schema": schema}}
    answer = ask(client, ARABIC, response_format=form, extra_body={**GUARD, "language": "ar"})
    assert isinstance(json.loads(answer.choices[0].message.content or "")["urgent"], bool)
    answer = ask(
        client, ARABIC, extra_body={**GUARD, "language": "ar", "structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert answer.choices[0].message.content in ("yes", "no")


def test_clients_do_not_reach_the_engines_extra_arguments(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, ENGLISH, extra_body={"vllm_xargs": {"reply_language": "ar"}})
