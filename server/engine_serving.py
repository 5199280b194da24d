"""vLLM's serving objects with what Vicuna replies, checkpoints that change and OpenAI's envelope need of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.checkpoints.turnstile import Visit
from server.errors import ApiError

log = logging.getLogger(__name__)

OnReply = Callable[[str], None]
"""Called with a finished reply's text, once for each choice."""

ON_REPLY: ContextVar[OnReply] = ContextVar("on_reply")
"""What the request that this context answers wants to be told."""


class VicunaServingChat(OpenAIServingChat):
    """vLLM's chat serving over results less the space that every Vicuna reply begins with (`ASSISTANT: Hello`)."""

    def chat_completion_stream_generator(
        self, request: ChatCompletionRequest, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        results = spoken(result_generator, ON_REPLY.get())
        return super().chat_completion_stream_generator(request, results, *args, **kwargs)

    async def chat_completion_full_generator(
        self, request: ChatCompletionRequest, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> ErrorResponse | ChatCompletionResponse:
        results = spoken(result_generator, ON_REPLY.get())
        return await super().chat_completion_full_generator(request, results, *args, **kwargs)


async def spoken(results: AsyncIterator[RequestOutput], on_reply: OnReply) -> AsyncGenerator[RequestOutput, None]:
    """`results` with one leading space taken from each choice's text, whole or in deltas; reports finished replies."""
    replies: dict[int, list[str]] = {}
    async for result in results:
        for output in result.outputs:
            parts = replies.setdefault(output.index, [])
            if output.text:
                output.text = output.text if parts else output.text.removeprefix(" ")
                parts.append(output.text)
            if output.finish_reason is not None:
                on_reply("".join(parts))
        yield result


class Handover:
    """Counts a request's prompts into the engine; with the last one, its visit at the turnstile is over."""

    def __init__(self, visit: Visit, prompts: int) -> None:
        self._visit, self._left = visit, prompts

    def one(self) -> None:
        self._left -= 1
        if not self._left:
            self._visit.leave()


HANDOVER: ContextVar[Handover | None] = ContextVar("handover", default=None)
"""What waits for the prompts of the request that this context answers."""


class HandedLLM(AsyncLLM):
    """vLLM's client, which says of each prompt that the engine has it: from then on it is among the unfinished."""

    async def add_request(self, *args: Any, **kwargs: Any) -> RequestOutputCollector:
        collector = await super().add_request(*args, **kwargs)
        if handover := HANDOVER.get():
            handover.one()
        return collector


Generated = AsyncGenerator[str, None] | ChatCompletionResponse | CompletionResponse


async def begun(generated: Generated | ErrorResponse) -> Generated:
    """`generated`, or ApiError where it is a refusal. vLLM streams some refusals, as a first event: raised as well."""
    if isinstance(generated, ErrorResponse):
        raise as_api_error(generated)
    if isinstance(generated, ChatCompletionResponse | CompletionResponse):
        return generated
    first = await anext(generated)
    if first.startswith('data: {"error"'):
        await generated.aclose()
        raise as_api_error(ErrorResponse.model_validate_json(first.removeprefix("data: ")))
    return _continued(first, generated)


async def _continued(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        # A client that leaves closes this generator; only closing vLLM's frees the request's slot.
        await rest.aclose()


def as_api_error(problem: ErrorResponse | Exception) -> ApiError:
    """vLLM's refusal or exception, in this service's envelope, without the value that vLLM may quote."""
    error = (problem if isinstance(problem, ErrorResponse) else create_error_response(problem)).error
    status = int(error.code)
    if status >= 500 and not isinstance(problem, ErrorResponse):
        log.error("unexpected %s while answering a request", type(problem).__name__)
    message = str(problem.args[0]) if isinstance(problem, VLLMValidationError) else error.message
    headers = {"Retry-After": "5"} if status == 503 else None
    return ApiError(status, message, param=error.param, code=_code(status), headers=headers)


def _code(status: int) -> str:
    return {404: "model_not_found", 503: "overloaded"}.get(status, "invalid_value" if status < 500 else "engine_error")
