"""Everything a client can get wrong is a 4xx in OpenAI's envelope, and the next request is served."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from server.settings import EMBEDDED_CHECKPOINT
from tests.conftest import RunningService

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
SECRET = "zanzibar-mammogram"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "bimedix", "messages": HELLO, "max_tokens": 1, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "bimedix", "prompt": "Hello", "max_tokens": 1, **fields}


def says(content: Any, role: str = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])


RECURSIVE_SCHEMA = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}
COUNTED_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 10**9}


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


BODIES: dict[str, tuple[str, Any, int]] = {
    "empty messages": (CHAT, chat(messages=[]), 400),
    "no messages": (CHAT, {"model": "bimedix"}, 400),
    "messages not a list": (CHAT, chat(messages="Hello"), 400),
    "message not an object": (CHAT, chat(messages=["Hello"]), 400),
    "null content": (CHAT, says(None), 400),
    "empty content": (CHAT, says("  "), 400),
    "number as content": (CHAT, says(7), 400),
    "unknown role": (CHAT, says("Hello", "wizard"), 400),
    "role not a string": (CHAT, chat(messages=[{"role": ["user"], "content": "Hello"}]), 400),
    "tool message": (CHAT, says("42", "tool"), 400),
    "assistant last": (CHAT, chat(messages=[*HELLO, {"role": "assistant", "content": "Hi"}]), 400),
    "assistant first": (CHAT, chat(messages=[{"role": "assistant", "content": "Hi"}, *HELLO]), 400),
    "system in the middle": (CHAT, chat(messages=[*HELLO, {"role": "system", "content": "x"}, *HELLO]), 400),
    "only system": (CHAT, says("Be brief.", "system"), 400),
    "10,000 messages": (CHAT, chat(messages=HELLO * 10_000), 400),
    "unknown model": (CHAT, chat(model="gpt-4o"), 404),
    "unknown model, text": (TEXT, text(model="gpt-4o"), 404),
    "prompt over the context": (CHAT, says("word " * 5000), 400),
    "prompt over the context, text": (TEXT, text(prompt="word " * 5000), 400),
    "max_tokens over the context": (CHAT, chat(max_tokens=100_000), 400),
    "negative temperature": (CHAT, chat(temperature=-1), 400),
    "huge temperature": (CHAT, chat(temperature=1e300), 400),
    "temperature a string": (CHAT, chat(temperature="hot"), 400),
    "max_tokens 0": (CHAT, chat(max_tokens=0), 400),
    "max_tokens -1": (CHAT, chat(max_tokens=-1), 400),
    "max_tokens 2^63": (CHAT, chat(max_tokens=2**63), 400),
    "max_completion_tokens 0": (CHAT, chat(max_completion_tokens=0), 400),
    "text max_tokens 0": (TEXT, text(max_tokens=0), 400),
    "n of 10^9": (CHAT, chat(n=10**9), 400),
    "n of 0": (CHAT, chat(n=0), 400),
    "text n of 10^9": (TEXT, text(n=10**9), 400),
    "logprobs of 10^6": (CHAT, chat(logprobs=True, top_logprobs=10**6), 400),
    "text logprobs of 10^6": (TEXT, text(logprobs=10**6), 400),
    "prompt_logprobs of 10^6": (CHAT, chat(prompt_logprobs=10**6), 400),
    "10,000 stop strings": (CHAT, chat(stop=["x"] * 10_000), 400),
    "empty stop string": (CHAT, chat(stop=[""]), 400),
    "unknown logit_bias id": (CHAT, chat(logit_bias={"999999": 1}), 400),
    "logit_bias id not a number": (CHAT, chat(logit_bias={"hello": 1}), 400),
    "negative logit_bias id": (CHAT, chat(logit_bias={"-5": 1}), 400),
    "unknown allowed token": (CHAT, chat(allowed_token_ids=[999_999]), 400),
    "unknown stop token": (CHAT, chat(stop_token_ids=[-4]), 400),
    "prompt token out of the vocabulary": (TEXT, text(prompt=[5, 999_999]), 400),
    "negative prompt token": (TEXT, text(prompt=[-1]), 400),
    "empty prompt": (TEXT, text(prompt=""), 400),
    "no prompt": (TEXT, {"model": "bimedix"}, 400),
    "many prompts": (TEXT, text(prompt=["a"] * 10_000), 400),
    "seed 2^64": (CHAT, chat(seed=2**64), 400),
    "catastrophic regex": (CHAT, chat(structured_outputs={"regex": "(a+)+$"}), 400),
    "counted regex": (CHAT, chat(structured_outputs={"regex": "((a{1,100}){1,100}){1,100}"}), 400),
    "broken regex": (CHAT, chat(structured_outputs={"regex": "(["}), 400),
    "long regex": (CHAT, chat(structured_outputs={"regex": "a" * 10_000}), 400),
    "recursive schema": (CHAT, schema(RECURSIVE_SCHEMA), 400),
    "counted schema": (CHAT, schema(COUNTED_SCHEMA), 400),
    "schema with a foreign reference": (CHAT, schema({"$ref": "http://127.0.0.1:9/x.json"}), 400),
    "catastrophic pattern in a schema": (CHAT, schema({"type": "string", "pattern": "(x+x+)+y"}), 400),
    "large schema": (CHAT, schema({"enum": ["x" * 100] * 1000}), 400),
    "grammar": (CHAT, chat(structured_outputs={"grammar": 'root ::= "a" root'}), 400),
    "chat_template": (CHAT, chat(chat_template="{{ 1 }}"), 400),
    "chat_template_kwargs": (CHAT, chat(chat_template_kwargs={"x": 1}), 400),
    "prompt_embeds": (TEXT, text(prompt_embeds="AAAA"), 400),
    "kv_transfer_params": (CHAT, chat(kv_transfer_params={"x": 1}), 400),
    "vllm_xargs": (CHAT, chat(vllm_xargs={"x": 1}), 400),
    "unknown parameter": (CHAT, chat(temprature=0.5), 400),
    "unknown language": (CHAT, chat(language="fr"), 400),
    "image": (CHAT, says([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]), 400),
    "audio": (CHAT, says([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), 400),
    "file": (CHAT, says([{"type": "file", "file": {"file_id": "file-1"}}]), 400),
    "stream_options without stream": (CHAT, chat(stream_options={"include_usage": True}), 400),
    "tools without a parser": (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400),
    "a list": (CHAT, [1, 2], 400),
    "body over the limit": (CHAT, says("x" * 3_000_000), 413),
}

JSON_TYPE = {"Content-Type": "application/json"}
RAW: dict[str, tuple[bytes, dict[str, str], int]] = {
    "invalid JSON": (b'{"model": ', JSON_TYPE, 400),
    "empty body": (b"", JSON_TYPE, 400),
    "null": (b"null", JSON_TYPE, 400),
    "wrong content type": (b"model=bimedix", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "no content type": (json.dumps(chat()).encode(), {}, 415),
    "deeply nested": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON_TYPE, 400),
    "unclosed nesting": (b'{"a":' * 50_000, JSON_TYPE, 400),
    "NaN": (
        b'{"model": "bimedix", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        JSON_TYPE,
        400,
    ),
    "infinite": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', JSON_TYPE, 400),
    "5,000 digits": (b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}", JSON_TYPE, 400),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', JSON_TYPE, 400),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', JSON_TYPE, 400),
    "raw NUL": (b'{"messages": [{"role": "user", "content": "a\x00b"}]}', JSON_TYPE, 400),
    "overlong header": (json.dumps(chat()).encode(), {**JSON_TYPE, "X-Long": "x" * 200_000}, 431),
    "many headers": (json.dumps(chat()).encode(), {**JSON_TYPE, **{f"X-{n}": "x" * 100 for n in range(2000)}}, 431),
    "endless header": (json.dumps(chat()).encode(), {**JSON_TYPE, "X-Long": "x" * 5_000_000}, 431),
}


def assert_envelope(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"
    assert len(response.content) < 2000


def assert_still_serving(service: RunningService) -> None:
    response = httpx.post(service.url + CHAT, json=chat(), timeout=30)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", BODIES)
def test_bad_body_is_refused(service: RunningService, name: str) -> None:
    path, body, status = BODIES[name]
    assert_envelope(httpx.post(service.url + path, json=body, timeout=10), status)
    assert_still_serving(service)


STREAMABLE = [name for name, (_, body, _) in BODIES.items() if isinstance(body, dict) and "stream_options" not in body]


@pytest.mark.parametrize("name", STREAMABLE)
def test_bad_body_is_refused_before_a_stream_begins(service: RunningService, name: str) -> None:
    path, body, status = BODIES[name]
    assert_envelope(httpx.post(service.url + path, json={**body, "stream": True}, timeout=10), status)


@pytest.mark.parametrize("name", RAW)
def test_bad_bytes_are_refused(service: RunningService, name: str) -> None:
    content, headers, status = RAW[name]
    response = httpx.post(service.url + CHAT, content=content, headers=headers, timeout=10)
    assert_envelope(response, status)
    assert_still_serving(service)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS to a port without it
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /" + b"x" * 300_000, 431),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 300_000,
            431,
        ),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
    ],
    ids=["TLS", "no colon", "length", "two lengths", "endless URL", "endless chunk", "h2c"],
)
def test_what_is_not_http_is_answered_and_the_connection_ends(
    service: RunningService, sent: bytes, status: int
) -> None:
    with socket.create_connection(service.address, timeout=30) as connection:
        connection.sendall(sent)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        while status != 200 and connection.recv(65536):
            pass


def test_chunked_body_over_the_limit(service: RunningService) -> None:
    chunks = (b"x" * 100_000 for _ in range(40))
    response = httpx.post(service.url + CHAT, content=chunks, headers=JSON_TYPE, timeout=10)
    assert_envelope(response, 413)
    assert_still_serving(service)


def test_context_error_says_how_long_and_what_fits(service: RunningService) -> None:
    body = says("word " * 3000)
    message = httpx.post(service.url + CHAT, json=body, timeout=10).json()["error"]["message"]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    tokens = tokenizer.apply_chat_template(body["messages"], return_dict=False)
    assert f"{len(tokens)} tokens" in message
    assert "2048" in message


@pytest.mark.parametrize(
    "body",
    [
        chat(messages=[{"role": "user", "content": {"nested": SECRET}}]),
        chat(messages=[{"role": SECRET, "content": "x"}]),
        says([{"type": "text", "text": [SECRET]}]),
        text(prompt={"a": SECRET}),
        chat(stop={"a": SECRET}),
        chat(temperature=SECRET),
        chat(messages=[{"role": "user", "content": SECRET + " word" * 5000}]),
    ],
)
def test_errors_never_repeat_what_was_sent(service: RunningService, body: dict[str, Any]) -> None:
    path = TEXT if "prompt" in body else CHAT
    response = httpx.post(service.url + path, json=body, timeout=10)
    assert_envelope(response, 400)
    assert SECRET not in response.text
    assert SECRET not in service.log.read_text()


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/tokenize", "/invocations", "/v1/messages", "/v1/load_lora_adapter"]
)
def test_no_other_route_is_exposed(service: RunningService, path: str) -> None:
    assert_envelope(httpx.post(service.url + path, json={}, timeout=10), 404)


def test_wrong_method(service: RunningService) -> None:
    assert_envelope(httpx.get(service.url + CHAT, timeout=10), 405)
