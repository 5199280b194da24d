"""The language guard as a vLLM logits processor, for both of vLLM's model runners.

vLLM imports this module by name in its engine process, which is why it stands beside `engine.py`: that one would bring
the whole server with it. The V1 runner serves CPUs, and what the V2 runner can't do yet; V2 needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from server.language.guard import CODES, UNGUARDED, Guard, Tables
from server.language.token_classes import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.sampling_params import SamplingParams

LANGUAGE_ARG = "reply_language"
"""The name, in a request's extra arguments, of the language that its reply is kept in."""


def use_guard(config: VllmConfig) -> None:
    """Have the engine that starts from `config` load the guard. Raises ValueError where it can't work."""
    if config.speculative_config is not None:
        raise ValueError("the language guard does not work with speculative decoding")
    _vocabulary(config.model_config)
    processor = V2Guard if config.use_v2_model_runner else V1Guard
    others = config.model_config.logits_processors or []
    config.model_config.logits_processors = [*others, f"{__name__}:{processor.__name__}"]


def _vocabulary(model: ModelConfig) -> Vocabulary:
    tokenizer: Any = cached_tokenizer_from_config(model)
    ends = model.hf_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return read_vocabulary(tokenizer, model.get_vocab_size(), {*ends, tokenizer.eos_token_id})


def _tables(config: VllmConfig, device: torch.device) -> Tables:
    return Tables(_vocabulary(config.model_config), device)


def _code(params: SamplingParams) -> int:
    language = (params.extra_args or {}).get(LANGUAGE_ARG)
    return UNGUARDED if language is None else CODES[language]


@dataclass
class Followed:
    """A guarded reply in V1's batch: vLLM's own list of its tokens, and how many of them the guard has taken."""

    slot: int
    tokens: list[int]
    taken: int = 0

    def next_token(self) -> int | None:
        """The first token not taken yet, which is taken now. A negative one is still on its way from the device."""
        if self.taken == len(self.tokens) or self.tokens[self.taken] < 0:
            return None
        self.taken += 1
        return self.tokens[self.taken - 1]


class V1Guard(V1Processor):
    """Follows requests through V1's batch, where they move between rows; a preempted one comes back with its tokens."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        # Slot 0 stays unguarded. Twice as many as run: within one update requests join before others have left.
        self.guard = Guard(_tables(vllm_config, device), 2 * vllm_config.scheduler_config.max_num_seqs + 1)
        self.device = device
        self.rows: dict[int, Followed] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._follow)

    def _follow(self, params: SamplingParams, _prompt: list[int] | None, tokens: list[int]) -> Followed | None:
        code = _code(params)
        if code == UNGUARDED:
            return None
        used = {followed.slot for followed in self.rows.values()}
        slot = next(slot for slot in range(1, len(self.guard.state)) if slot not in used)
        self.guard.begin([slot], [code])
        return Followed(slot, tokens)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.rows:
            return logits
        for slots, tokens in self._rounds():
            self.guard.advance(self._tensor(slots), self._tensor(tokens))
        slots = [self.rows[row].slot if row in self.rows else 0 for row in range(len(logits))]
        return self.guard.mask(self._tensor(slots), logits)

    def _rounds(self) -> Iterator[tuple[list[int], list[int]]]:
        """Slots and their next tokens, until none is left: one round a step, more for a reply that was preempted."""
        pending = list(self.rows.values())
        while pending:
            taken = [(followed, followed.next_token()) for followed in pending]
            pairs = [(followed.slot, token) for followed, token in taken if token is not None]
            pending = [followed for followed, token in taken if token is not None]
            if pairs:
                slots, tokens = zip(*pairs, strict=True)
                yield list(slots), list(tokens)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)


class V2Guard(V2Processor):
    """Reads the last token of each request on the device, so that the host never waits for it."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.guard = Guard(_tables(vllm_config, req_states.device), req_states.max_num_reqs)
        self.requests = req_states
        self.taken = torch.zeros(req_states.max_num_reqs, dtype=torch.int64, device=req_states.device)
        """[slot]: how many tokens of the sequence the guard has taken, or need not."""
        self.codes = [UNGUARDED] * req_states.max_num_reqs
        self.joined: list[int] = []

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.codes[req_idx] = _code(sampling_params)
        self.joined.append(req_idx)
        return self.codes[req_idx] != UNGUARDED

    def apply_staged_writes(self) -> None:
        if not self.joined:
            return
        joined, self.joined = list(dict.fromkeys(self.joined)), []
        self.guard.begin(joined, [self.codes[slot] for slot in joined])
        filled = [int(self.requests.prefill_len.np[slot]) for slot in joined]
        self.taken[torch.tensor(joined, device=self.taken.device)] = torch.tensor(filled, device=self.taken.device)
        for slot, end in zip(joined, filled, strict=True):
            if self.codes[slot] != UNGUARDED:
                self._replay(slot, int(self.requests.prompt_len.np[slot]), end)

    def _replay(self, slot: int, begin: int, end: int) -> None:
        """Take the tokens that a preempted request had already produced; none for a new one."""
        slots = torch.tensor([slot], device=self.taken.device)
        for position in range(begin, end):
            self.guard.advance(slots, self.requests.all_token_ids.gpu[slot, position : position + 1])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        if all(self.codes[slot] == UNGUARDED for slot in ctx.idx_mapping_np.tolist()):
            return logits
        slots = ctx.expanded_idx_mapping
        # Below what was filled in, the input is the prompt's; the same position never counts twice.
        fresh = ctx.pos >= self.taken[slots]
        self.guard.advance(slots, ctx.input_ids, fresh)
        self.taken[slots] = torch.where(fresh, ctx.pos + 1, self.taken[slots])
        return self.guard.mask(slots, logits)
