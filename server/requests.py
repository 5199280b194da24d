"""Generation requests: vLLM's own models, with bounds on what costs memory or time and refusals of what is not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from server.engine import ChatCompletionRequest, CompletionRequest
from server.vicuna import Message

MAX_MESSAGES = 1024
MAX_PATTERN = 500
MAX_REPEAT = 1000
MAX_SCHEMA = 16_000

# Fields of vLLM's that reach past one reply: into the template, the scheduler, other machines or other requests' ids.
REFUSED = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "cache_salt", "chat_template", "chat_template_kwargs",
        "continue_final_message", "documents", "ec_transfer_params", "kv_transfer_params", "logprob_token_ids",
        "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "priority", "prompt_embeds", "repetition_detection",
        "request_id", "return_mm_kwargs", "routed_experts_prompt_start", "session_id", "thinking_token_budget",
        "truncate_prompt_tokens", "truncation_side", "use_beam_search", "vllm_xargs", "watermarking",
    }
)  # fmt: skip

# OpenAI's own fields that mean nothing here; clients send them by habit.
IGNORED = frozenset(
    {
        "metadata", "modalities", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store", "verbosity", "web_search_options",
    }
)  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Refusal(ValueError):
    """A ValueError that carries the parameter's name into the error envelope."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Bounded(BaseModel):
    """The sampling fields that chat and text completions share, within what one request may ask for."""

    model: Annotated[str, Field(max_length=200)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    max_tokens: Count | None = None
    min_tokens: int = Field(0, ge=0, lt=2**31)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=300
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16)] | None = []
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=1000)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=100)] = []
    user: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if name in REFUSED:
                raise Refusal("this service does not take this parameter", name)
            if name not in cls.model_fields and name not in IGNORED:
                raise Refusal("unknown parameter", str(name)[:100])
        return {name: value for name, value in data.items() if name not in IGNORED}

    @model_validator(mode="before")
    @classmethod
    def _tractable_constraints(cls, data: Any) -> Any:
        if isinstance(data, dict):
            _check_response_format(data.get("response_format"))
            _check_structured_outputs(data.get("structured_outputs"))
            for tool in data.get("tools") or []:
                function = tool.get("function") if isinstance(tool, dict) else None
                _check_schema(function.get("parameters") if isinstance(function, dict) else None, "tools")
        return data


class ChatRequest(Bounded, ChatCompletionRequest):
    """A chat completion, with the reply's language as an extension."""

    messages: list[Any] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = None
    n: int | None = Field(1, ge=1, le=16)
    top_logprobs: int = Field(0, ge=0, le=20)
    language: Literal["auto", "en", "ar"] = Field("auto", description="Which language to answer in.")
    language_policy: Literal["off", "guide", "guard"] | None = Field(
        None, description="How the reply's language is kept; the service's own policy by default."
    )
    conversation: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="Take this turn in a stored conversation; `messages` are then what is new."
    )

    @model_validator(mode="after")
    def _text_messages(self) -> ChatRequest:
        self.messages = [text_message(number, message) for number, message in enumerate(self.messages)]
        return self

    @model_validator(mode="after")
    def _one_reply_a_turn(self) -> ChatRequest:
        if self.conversation is not None and self.n != 1:
            raise Refusal("a conversation takes one reply a turn", "n")
        return self


class TextRequest(Bounded, CompletionRequest):
    """A raw text completion."""

    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    n: int = Field(1, ge=1, le=16)
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )

    @model_validator(mode="after")
    def _room_to_answer(self) -> TextRequest:
        if self.max_tokens == 0 and not self.echo:
            raise Refusal("0 tokens make sense only with echo", "max_tokens")
        return self


# --- messages ---------------------------------------------------------------------------------------------------

CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def text_message(number: int, message: object, param: str = "messages") -> Message:
    """One OpenAI message as a role and its text. Raises for other roles, for content that is not text, and for none.

    `param` is the request's name for the list that `message` stands in.
    """
    where = f"{param}.{number}"
    if not isinstance(message, Mapping):
        raise Refusal(f"{where} is not an object", param)
    role = CHAT_ROLES.get(message.get("role"))  # type: ignore[arg-type]
    if role is None:
        raise Refusal(f"{where}.role must be system, developer, user or assistant", param)
    if message.get("tool_calls") or message.get("function_call"):
        raise Refusal(f"{where} has tool calls, which a Vicuna conversation cannot hold", param)
    return {"role": role, "content": _text(message.get("content"), where, param)}


def _text(content: object, where: str, param: str) -> str:
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content.{i}", param) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise Refusal(f"{where}.content must be text", param)
    if not content.strip():
        raise Refusal(f"{where}.content is empty", param)
    return content


def _part(part: object, where: str, param: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
        raise Refusal(f"{where}: this model reads text only", param)
    text = part.get("text")
    if not isinstance(text, str):
        raise Refusal(f"{where}.text must be text", param)
    return text


# --- constraints on the reply's form ----------------------------------------------------------------------------

COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
REPEATED_GROUP = re.compile(r"[*+}]\??\)+(?:[*+]|\{\d)")


def _check_response_format(value: object) -> None:
    if not isinstance(value, dict):
        return
    if value.get("type") == "structural_tag":
        raise Refusal("structural tags are not offered", "response_format")
    inner = value.get("json_schema")
    _check_schema(inner.get("schema") if isinstance(inner, dict) else None, "response_format")


def _check_structured_outputs(value: object) -> None:
    if not isinstance(value, dict):
        return
    param = "structured_outputs"
    if unknown := set(value) - {"json", "regex", "choice"}:
        raise Refusal(f"{sorted(map(str, unknown))[0][:50]} is not offered; use json, regex or choice", param)
    if value.get("regex") is not None:
        _check_pattern(value["regex"], param)
    choice = value.get("choice")
    if choice is not None and not (
        isinstance(choice, list)
        and 0 < len(choice) <= 100
        and all(isinstance(c, str) and 0 < len(c) <= 500 for c in choice)
    ):
        raise Refusal("choice takes 1 to 100 strings of at most 500 characters", param)
    schema = value.get("json")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise Refusal("json is not a JSON schema", param) from None
    _check_schema(schema, param)


def _is_choice(value: object) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= 100:
        return False
    return all(isinstance(option, str) and 0 < len(option) <= 500 for option in value)


def _check_pattern(pattern: object, param: str) -> None:
    """Refuse what a grammar compiler could take minutes over: long, doubly repeated or highly counted patterns."""
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise Refusal(f"a pattern takes 1 to {MAX_PATTERN} characters", param)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise Refusal("the pattern is not a regular expression", param) from None
    if REPEATED_GROUP.search(pattern):
        raise Refusal("the pattern repeats a group that already repeats", param)
    counted = 1
    for low, high in COUNTED.findall(pattern):
        counted *= max(1, int(high or low))
    if counted > MAX_REPEAT:
        raise Refusal(f"the pattern's repetitions multiply to more than {MAX_REPEAT}", param)


def _check_schema(schema: object, param: str) -> None:
    """Refuse schemas that are large or refer to themselves, and check their patterns and bounds."""
    if schema is None:
        return
    if not isinstance(schema, dict):
        raise Refusal("a JSON schema is an object", param)
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise Refusal(f"the JSON schema is longer than {MAX_SCHEMA} characters", param)
    _SchemaWalk(schema, param).visit(schema)


class _SchemaWalk:
    """One pass over a schema that enters each `$ref` once."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self.root = root
        self.param = param
        self.entered: list[str] = []
        self.left: set[str] = set()

    def visit(self, node: object) -> None:
        if isinstance(node, list):
            for item in node:
                self.visit(item)
        if not isinstance(node, dict):
            return
        if isinstance(node.get("$ref"), str):
            self.follow(node["$ref"])
        if isinstance(node.get("pattern"), str):
            _check_pattern(node["pattern"], self.param)
        for name in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            bound = node.get(name)
            if isinstance(bound, int | float) and not 0 <= bound <= MAX_REPEAT:
                raise Refusal(f"{name} takes 0 to {MAX_REPEAT}", self.param)
        for value in node.values():
            self.visit(value)

    def follow(self, reference: str) -> None:
        if reference in self.entered:
            raise Refusal("the JSON schema refers to itself, so its replies have no bound", self.param)
        if reference in self.left:
            return
        self.entered.append(reference)
        self.visit(_resolve(reference, self.root, self.param))
        self.left.add(self.entered.pop())


def _resolve(reference: str, root: dict[str, Any], param: str) -> object:
    """What a local `$ref` points to."""
    node: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    if not reference.startswith("#") or node is None:
        raise Refusal("the JSON schema refers to something that is not in it", param)
    return node
