"""Bodies of the conversation and response routes, checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from openai.types.responses import ResponseTextConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from server.conversations.items import read_items
from server.conversations.values import Message, checked_metadata
from server.errors import describe
from server.requests import ChatRequest, Count, Refusal, Stop

MAX_ITEMS = 20
"""OpenAI's limit for items added at a time."""
MAX_INPUT_ITEMS = 1024
HABITS = frozenset(
    {
        "include", "max_tool_calls", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "stream_options", "tool_choice",
        "top_logprobs", "user",
    }
)  # fmt: skip
"""OpenAI's own fields that mean nothing here; clients send them by habit."""


def _within_limits(value: Any) -> Any:
    return checked_metadata(value) if value is None or isinstance(value, dict) else value


Metadata = Annotated[dict[str, str], BeforeValidator(_within_limits)]
Items = Annotated[list[Any], Field(max_length=MAX_ITEMS)]
Id = Annotated[str, Field(max_length=100)]


class Strict(BaseModel):
    """A body without unknown fields."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if name not in cls.model_fields and name not in HABITS:
                raise Refusal("this service does not take this parameter", str(name)[:100])
        return data


class ExpiresAfter(BaseModel):
    """A time to live, counted from when a conversation's last turn began."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["last_active_at"]
    seconds: int = Field(ge=1, le=10 * 365 * 86400)


class ConversationCreate(Strict):
    """A new conversation; `expires_after` is this service's addition to OpenAI's fields."""

    metadata: Metadata = {}
    items: Items | None = None
    expires_after: ExpiresAfter | None = None
    _messages: tuple[Message, ...] = PrivateAttr(())

    @property
    def messages(self) -> tuple[Message, ...]:
        return self._messages

    @model_validator(mode="after")
    def _text_items(self) -> ConversationCreate:
        self._messages = read_items(self.items or [], "items")
        return self


class ConversationUpdate(Strict):
    """New metadata in place of the old."""

    metadata: Metadata


class ItemsCreate(Strict):
    """Messages to append."""

    items: Annotated[list[Any], Field(min_length=1, max_length=MAX_ITEMS)]
    _messages: tuple[Message, ...] = PrivateAttr(())

    @property
    def messages(self) -> tuple[Message, ...]:
        return self._messages

    @model_validator(mode="after")
    def _text_items(self) -> ItemsCreate:
        self._messages = read_items(self.items, "items")
        return self


class ConversationId(BaseModel):
    """OpenAI's other way to name a conversation."""

    id: Id


class ResponseRequest(Strict):
    """A turn: what is new, what it follows, and how to sample. Fields below `text` are this service's additions."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Any], Field(min_length=1, max_length=MAX_INPUT_ITEMS)]
    model: Annotated[str, Field(max_length=200)] | None = None
    instructions: str | None = None
    conversation: Id | ConversationId | None = None
    previous_response_id: Id | None = None
    metadata: Metadata = {}
    store: bool = True
    stream: bool = False
    background: bool = False
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] = "auto"
    tools: list[Any] = []
    text: ResponseTextConfig | None = None

    language: Literal["auto", "en", "ar"] = Field("auto", description="Which language to answer in.")
    language_policy: Literal["off", "guide", "guard"] | None = None
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False

    _messages: tuple[Message, ...] = PrivateAttr(())
    _chat: ChatRequest = PrivateAttr()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The input, in Vicuna form."""
        return self._messages

    @property
    def chat(self) -> ChatRequest:
        """The generation that this asks for, without its messages."""
        return self._chat

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _possible(self) -> ResponseRequest:
        if self.background:
            raise Refusal("this service has no background responses", "background")
        if self.tools:
            raise Refusal("this model calls no tools", "tools")
        if self.conversation is not None and self.previous_response_id is not None:
            raise Refusal("a response follows a conversation or another response, not both", "previous_response_id")
        if self.conversation is not None and not self.store:
            raise Refusal("a turn of a conversation is always stored", "store")
        self._messages = read_items(self.input, "input")
        if self._messages[-1].speaker != "human":
            raise Refusal("the last message must be the user's: there is nothing to answer", "input")
        self._chat = self._as_chat()
        return self

    def _as_chat(self) -> ChatRequest:
        sampling = {
            "model", "stream", "temperature", "top_p", "seed", "stop", "top_k", "min_p", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "ignore_eos", "language", "language_policy",
        }  # fmt: skip
        fields = self.model_dump(include=sampling, exclude_none=True)
        fields["max_completion_tokens"] = self.max_output_tokens
        fields["response_format"] = response_format(self.text)
        if self.stream:
            fields["stream_options"] = {"include_usage": True}
        try:
            return ChatRequest.model_validate({**fields, "messages": [{"role": "user", "content": "?"}]})
        except ValidationError as error:
            reason, param = describe(error.errors())
            name = {"response_format": "text", "max_completion_tokens": "max_output_tokens"}.get(str(param), str(param))
            raise Refusal(reason.removeprefix(f"{param}: "), name) from None


def response_format(text: ResponseTextConfig | None) -> dict[str, Any] | None:
    """`text.format` of the Responses API as chat's `response_format`, which nests a schema one level deeper."""
    if text is None or text.format is None:
        return None
    form = text.format.model_dump(by_alias=True, exclude_none=True)
    if form["type"] != "json_schema":
        return form
    return {"type": form.pop("type"), "json_schema": form}
