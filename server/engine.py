"""The seam to vLLM: settings to engine arguments, and the engine with vLLM's own serving objects."""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import vllm
from fastapi import Request
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.triton_utils import HAS_TRITON
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import get_prometheus_registry

from server.checkpoints.architecture import Shape, expected_tensors
from server.checkpoints.serving import Serving
from server.checkpoints.turnstile import Turnstile, Visit
from server.checkpoints.unmerged import Unmerged
from server.engine_flags import NO_TRITON, parse_engine_flags
from server.engine_guard import LANGUAGE_ARG, use_guard
from server.engine_serving import (
    HANDOVER,
    ON_REPLY,
    Generated,
    HandedLLM,
    Handover,
    OnReply,
    VicunaServingChat,
    begun,
)
from server.errors import ApiError
from server.language import Language
from server.settings import EMBEDDED_CHECKPOINT, Settings

__all__ = [
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "Engine",
    "Generated",
    "StreamOptions",
    "start",
    "with_cancellation",
]

log = logging.getLogger(__name__)

VLLM_VERSION: str = vllm.__version__
SWAGGER_FILES = Path(vllm.__file__).parent / "entrypoints" / "serve" / "instrumentator" / "static"
CHAT_TEMPLATE = EMBEDDED_CHECKPOINT / "chat_template.jinja"
PROBE_SECONDS = 10.0
"""How long an engine may go without a token, while it has work, before it counts as hung."""
RELOAD_SECONDS = 900.0
"""How long new weights may take from the page cache into the engine, before it counts as hung."""
RESET_SECONDS = 10.0
"""How long the blocks of replies that were just aborted may stay in use."""


TOO_LONG = {"input_text", "input_tokens"}
"""What vLLM calls the parameter when a prompt does not fit."""


@dataclass(frozen=True)
class Sample:
    """What the engine wrote: text, tokens, and the log probability of each."""

    text: str
    tokens: list[int]
    logprobs: list[float]


@dataclass(eq=False, frozen=True)
class Applied:
    """An adapter that vLLM has loaded. `visits` are those of requests that may not have reached vLLM yet."""

    name: str
    directory: Path
    revision: str
    number: int
    visits: WeakSet[Visit] = field(default_factory=WeakSet, repr=False)


@dataclass
class Engine:
    """A running engine and the serving objects over it."""

    client: AsyncLLM
    chat: VicunaServingChat
    completion: OpenAIServingCompletion
    models: OpenAIServingModels
    turnstile: Turnstile
    no_guard: str | None = None
    """Why this engine can't guard a reply's language; None where it can."""
    adapters: dict[str, Applied] = field(default_factory=dict)
    """By the names that requests use."""
    _numbers: Iterator[int] = field(default_factory=lambda: count(1), repr=False)
    _probe: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def max_model_len(self) -> int:
        """The context window, in tokens."""
        return int(self.client.model_config.max_model_len)

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.models.base_model_paths[0].name

    @property
    def vocab_size(self) -> int:
        return int(self.client.model_config.get_vocab_size())

    @property
    def top_k(self) -> int:
        """How many experts see each token."""
        return int(self.client.model_config.hf_config.num_experts_per_tok)

    @property
    def serving(self) -> Serving:
        """The checkpoint that whoever enters now is answered by."""
        return self.turnstile.serving

    async def create_chat(
        self,
        request: ChatCompletionRequest,
        raw_request: Request | None,
        visit: Visit,
        on_reply: OnReply,
        guarded: Language | None = None,
    ) -> Generated:
        """vLLM's chat completion: the response, or its stream of events once the first is there. Raises ApiError.

        `visit` has entered. `guarded` is the language that decoding is to keep; a reply whose form the request
        prescribes is left alone.
        """
        ON_REPLY.set(on_reply)
        HANDOVER.set(Handover(visit, 1))
        if guarded is not None and not _prescribed(request):
            if self.no_guard is not None:
                raise ApiError(400, f"No guard: {self.no_guard}.", param="language_policy", code="invalid_value")
            request.vllm_xargs = {LANGUAGE_ARG: guarded}
        try:
            return await begun(await self.chat.create_chat_completion(request, raw_request))
        except VLLMValidationError as error:
            if error.parameter not in TOO_LONG:
                raise
            raise await self._too_long(partial(self._count_chat, request.messages), "messages") from None

    async def create_completion(self, request: CompletionRequest, raw_request: Request, visit: Visit) -> Generated:
        """vLLM's text completion, likewise."""
        HANDOVER.set(Handover(visit, len(_prompts(request.prompt))))
        try:
            return await begun(await self.completion.create_completion(request, raw_request))
        except VLLMValidationError as error:
            if error.parameter not in TOO_LONG:
                raise
            raise await self._too_long(partial(self._count_text, request.prompt), "prompt") from None

    async def _too_long(self, count: Callable[[], int], param: str) -> ApiError:
        """vLLM stops counting at the first token too many; people want to know how much to cut."""
        tokens = await asyncio.to_thread(count)
        message = f"The prompt is {tokens} tokens long; the context window holds {self.max_model_len}, reply included."
        return ApiError(400, message, param=param, code="context_length_exceeded")

    async def count_chat(self, messages: list[Any]) -> int:
        """How many tokens messages are as a prompt."""
        return await asyncio.to_thread(self._count_chat, messages)

    def _count_chat(self, messages: list[Any]) -> int:
        tokenizer = self.client.get_tokenizer()
        return len(tokenizer.apply_chat_template(messages, chat_template=self.chat.chat_template, return_dict=False))

    def _count_text(self, prompt: Any) -> int:
        """The longest of the prompts."""
        tokenizer = self.client.get_tokenizer()
        return max(len(tokenizer.encode(one)) if isinstance(one, str) else len(one) for one in _prompts(prompt))

    async def answers(self) -> bool:
        """Whether the engine produced a token just now: its own error flag says nothing about a hang (vllm#36451)."""
        if self.client.errored:
            return False
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._generate_one_token())
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), PROBE_SECONDS)
        except Exception as error:
            log.warning("the engine did not answer a probe: %s", type(error).__name__)
            return False
        return True

    async def _generate_one_token(self) -> None:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = tokens_input([self.client.model_config.hf_config.bos_token_id])
        visit = Visit(self.turnstile)
        await visit.enter()
        try:
            async for _ in self.client.generate(prompt, sampling, f"probe-{time.monotonic_ns()}"):
                pass
        finally:
            visit.leave()

    # Adapters, which `server.checkpoints.adapter_set` brings and takes away

    def claim(self, serving: Serving, request: ChatCompletionRequest | CompletionRequest, visit: Visit) -> str:
        """Whose reply it will be: the checkpoint's, or that with the adapter over it which `request` names.

        Keeps that revision of the adapter until the request has ended. `visit` has entered.
        """
        applied = self.adapters.get(request.model or "")
        if applied is None:
            return serving.id
        applied.visits.add(visit)
        request.model = applied.revision
        return f"{serving.id}+{applied.revision}"

    def requests_of(self, applied: Applied) -> int:
        """How many requests use this revision of an adapter."""
        entering = sum(visit.inside for visit in applied.visits)
        states = self.client.output_processor.request_states.values()
        return entering + sum(state.lora_name == applied.revision for state in states)

    def check_adapter(self, adapter: Unmerged) -> None:
        """Raises ValueError when this engine can't apply an adapter like it, and says what to do."""
        config = self.client.vllm_config.lora_config
        if config is None:
            raise ValueError("the service applies no adapters: start it with --adapter NAME=DIR, or --enable-lora")
        if adapter.adapts_experts and not HAS_TRITON:
            raise ValueError(NO_TRITON)
        if adapter.rank > config.max_lora_rank:
            raise ValueError(
                f"its rank is {adapter.rank}, and the service was started for {config.max_lora_rank} at most: start it "
                f"with --max-lora-rank {adapter.rank}"
            )
        if len(self.models.lora_requests) >= (config.max_cpu_loras or 0):
            raise ValueError(f"{config.max_cpu_loras} adapters are loaded, which is all there may be: remove one first")

    @cached_property
    def expected_tensors(self) -> dict[str, Shape]:
        """The weights of the model, name to shape. Raises ValueError for one that is no Mixtral."""
        return expected_tensors(self.client.model_config.hf_config.to_dict())

    async def load_adapter(self, adapter: Unmerged, revision: str) -> Applied:
        """Have vLLM load an adapter, which nobody can name yet. Raises RuntimeError."""
        applied = Applied(adapter.name, adapter.directory, revision, next(self._numbers))
        request = LoRARequest(revision, applied.number, str(adapter.directory))
        try:
            await self.client.add_lora(request)
        except Exception as error:
            await self.client.remove_lora(applied.number)
            raise RuntimeError(f"vLLM could not load it: {error}") from None
        self.models.lora_requests[revision] = request
        return applied

    async def unload_adapter(self, applied: Applied) -> None:
        """Have vLLM forget an adapter that no request uses."""
        self.models.lora_requests.pop(applied.revision, None)
        await self.client.remove_lora(applied.number)

    # For activations, which hold the turnstile closed and empty

    async def reload(self, serving: Serving) -> None:
        """Replace the weights in place by those of `serving`, and drop everything computed with the old ones.

        Raises RuntimeError or TimeoutError. The engine is paused then, until a reload succeeds.
        """
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                await self.client.pause_generation(mode="wait", clear_cache=False)
                await self.client.collective_rpc("bimedix_reload", args=(serving.source,))
        except TimeoutError:
            raise
        except Exception as error:
            raise RuntimeError(f"vLLM could not load the weights of {serving.id}: {error}") from None
        await self._drop_prefix_cache()
        await self.client.resume_generation()

    async def _drop_prefix_cache(self) -> None:
        # It refuses, without an exception, while blocks are in use, and stale blocks would be read by new weights.
        deadline = time.monotonic() + RESET_SECONDS
        while not await self.client.reset_prefix_cache(reset_connector=True):
            if time.monotonic() >= deadline:
                raise RuntimeError("vLLM could not drop the prefix cache: blocks are still in use")
            await asyncio.sleep(0.02)

    async def reply(self, messages: list[Any], max_tokens: int) -> Sample:
        """A greedy reply, past the turnstile."""
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        (output,) = (await self._generate(self._tokens(messages, add_generation_prompt=True), sampling)).outputs
        chosen = zip(output.token_ids, output.logprobs or [], strict=True)
        logprobs = [found[token].logprob for token, found in chosen if found]
        return Sample(output.text.strip(), list(output.token_ids), logprobs)

    async def score(self, messages: list[Any], reply: str) -> list[float]:
        """The log probability of each token of `reply`, its end included, after `messages`; past the turnstile."""
        asked = self._tokens(messages, add_generation_prompt=True)
        answered = self._tokens([*messages, {"role": "assistant", "content": reply}])
        begin = next(i for i, token in enumerate(answered) if i >= len(asked) or asked[i] != token)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        scored = (await self._generate(answered, sampling)).prompt_logprobs or []
        pairs = zip(answered[begin:], scored[begin:], strict=True)
        return [found[token].logprob for token, found in pairs if found is not None]

    def _tokens(self, messages: list[Any], **options: Any) -> list[int]:
        tokenizer = self.client.get_tokenizer()
        template = self.chat.chat_template
        tokens: Any = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)
        return list(tokens)

    async def _generate(self, tokens: list[int], sampling: SamplingParams) -> RequestOutput:
        generated = self.client.generate(tokens_input(tokens), sampling, f"canary-{uuid4().hex}")
        return [result async for result in generated][-1]

    async def watch_router(self) -> None:
        """Count which experts the router chooses, until `read_router`."""
        await self.client.collective_rpc("bimedix_watch_router", args=(self.top_k,))

    async def read_router(self) -> list[list[int]]:
        """How many tokens each layer sent to each expert; nothing where a compiled model can't be watched."""
        workers = await self.client.collective_rpc("bimedix_read_router")
        return [counts for worker in workers for counts in worker]

    def model_cards(self) -> list[dict[str, Any]]:
        """What GET /v1/models lists: the model, and it with each adapter."""
        manifest = self.serving.manifest
        card = {
            "id": self.name,
            "object": "model",
            "created": int(manifest.created.timestamp()) if manifest else 0,
            "owned_by": "bimedix",
            "max_model_len": self.max_model_len,
            "checkpoint": self.serving.id,
            "description": manifest.description if manifest else None,
        }
        over = (
            {"id": applied.name, "parent": self.name, "checkpoint": f"{self.serving.id}+{applied.revision}"}
            for applied in self.adapters.values()
        )
        return [card, *({**card, **adapter, "description": None} for adapter in over)]


@asynccontextmanager
async def start(settings: Settings, serving: Serving) -> AsyncIterator[Engine]:
    """Start vLLM in this process on `serving` and yield the engine. Takes seconds to minutes; the loop stays free."""
    args = parse_engine_flags(settings)
    args.model = serving.source
    client, no_guard = await asyncio.to_thread(_start_client, settings, args)
    try:
        engine = await _assemble(settings, args, client, serving)
        engine.no_guard = no_guard
        yield engine
    finally:
        client.shutdown(timeout=0)


def _start_client(settings: Settings, args: Namespace) -> tuple[AsyncLLM, str | None]:
    """The engine client, and why it has no language guard where it has none. Raises ValueError where it has to."""
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    no_guard = None
    try:
        use_guard(config)
    except ValueError as error:
        if settings.language_policy == "guard":
            raise
        no_guard = str(error)
    return HandedLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats), no_guard


def _prompts(prompt: Any) -> list[Any]:
    """A text completion's prompts: each is text or tokens."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _prescribed(request: ChatCompletionRequest) -> bool:
    """Whether the request says what form the reply has: JSON, a choice, a tool call, a set of tokens."""
    form = request.response_format
    return bool(
        request.structured_outputs
        or (form is not None and form.type != "text")
        or (request.tools and request.tool_choice != "none")
        or request.allowed_token_ids
    )


async def _assemble(settings: Settings, args: Namespace, client: AsyncLLM, serving: Serving) -> Engine:
    # The service speaks Vicuna: a checkpoint with our manifest brings its own template, any other gets ours.
    template = args.chat_template or (None if serving.manifest else CHAT_TEMPLATE.read_text(encoding="utf-8"))
    models = OpenAIServingModels(client, [BaseModelPath(settings.served_model_name, serving.source)])
    shared: dict[str, Any] = {"request_logger": None}
    tools = {"enable_auto_tools": args.enable_auto_tool_choice, "tool_parser": args.tool_call_parser}
    rendering: dict[str, Any] = {"chat_template": template, "chat_template_content_format": "string", **tools}
    renderer = OnlineRenderer(client.model_config, client.renderer, **shared, **rendering)
    await asyncio.to_thread(renderer.warmup)
    return Engine(
        client=client,
        chat=VicunaServingChat(
            client,
            models,
            "assistant",
            # Says how many of a prompt's tokens came from the prefix cache.
            enable_prompt_tokens_details=True,
            online_renderer=renderer,
            **shared,
            **rendering,
        ),
        completion=OpenAIServingCompletion(client, models, online_renderer=renderer, **shared),
        models=models,
        turnstile=Turnstile(serving, client.get_num_unfinished_requests),
    )


def metrics_registry() -> Any:
    """The Prometheus registry that vLLM's metrics live in."""
    return get_prometheus_registry()
