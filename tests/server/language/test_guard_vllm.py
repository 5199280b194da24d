"""The guard inside vLLM's two model runners: requests that join, move, leave, are preempted and come back."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, BatchUpdateBuilder, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from server import engine_guard
from server.engine_guard import LANGUAGE_ARG, V1Guard, V2Guard
from server.language.guard import CODES, Guard, Tables

CPU = torch.device("cpu")
Reply = tuple[str | None, list[int], list[int]]
"""Its language, the tokens it will have, and the list of those it has."""


def params(language: str | None) -> SamplingParams:
    return SamplingParams(extra_args={LANGUAGE_ARG: language} if language else None)


def free(tables: Tables, rows: int) -> torch.Tensor:
    return torch.zeros(rows, tables.bias.shape[1])


def expected(tables: Tables, language: str | None, tokens: list[int]) -> torch.Tensor:
    """The mask after `tokens`, from a guard that does nothing else."""
    guard, slot = Guard(tables, 1), torch.tensor([0])
    guard.begin([0], [CODES[language] if language else 0])  # type: ignore[index]
    for token in tokens:
        guard.advance(slot, torch.tensor([token]))
    return guard.mask(slot, free(tables, 1))[0]


def replies(tokenizer: Any) -> list[tuple[str | None, list[int]]]:
    texts = [
        ("ar", "تناول Panadol 500 mg"),
        ("en", "Take ٥ (خمس) tablets\nnow"),
        (None, "نعم OK"),
        ("ar", "\n- 1. نعم (CT scan"),
    ]
    return [(language, tokenizer.encode(f" {text}", add_special_tokens=False)) for language, text in texts]


# --- V1 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def v1(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> V1Guard:
    monkeypatch.setattr(engine_guard, "_tables", lambda config, device: tables)
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    return V1Guard(config, CPU, False)


def joined(*added: tuple[int, str | None, list[int]]) -> BatchUpdate:
    return BatchUpdate(len(added), [], [(row, params(language), [], tokens) for row, language, tokens in added], [])


def test_v1_follows_the_tokens_of_each_row(v1: V1Guard, tables: Tables, tokenizer: Any) -> None:
    given = replies(tokenizer)
    lists: list[list[int]] = [[] for _ in given]
    v1.update_state(joined(*((row, language, lists[row]) for row, (language, _) in enumerate(given))))
    for step in range(max(len(tokens) for _, tokens in given)):
        masks = v1.apply(free(tables, len(given)))
        for row, (language, tokens) in enumerate(given):
            assert torch.equal(masks[row], expected(tables, language, tokens[:step])), (row, step)
            lists[row] += tokens[step : step + 1]
        v1.update_state(None)


def test_v1_waits_for_a_token_that_is_on_its_way(v1: V1Guard, tables: Tables, tokenizer: Any) -> None:
    tokens = tokenizer.encode(" نعم", add_special_tokens=False)
    output = [tokens[0], -1]
    v1.update_state(joined((0, "ar", output)))
    assert torch.equal(v1.apply(free(tables, 1))[0], expected(tables, "ar", tokens[:1]))
    output[1] = tokens[1]
    assert torch.equal(v1.apply(free(tables, 1))[0], expected(tables, "ar", tokens[:2]))


def test_v1_leaves_a_batch_without_guarded_replies_alone(v1: V1Guard, tables: Tables) -> None:
    v1.update_state(joined((0, None, []), (1, None, [])))
    logits = free(tables, 2)
    assert v1.apply(logits) is logits and not logits.any()
    assert not v1.is_argmax_invariant()


class Batch:
    """vLLM's persistent batch, as far as it goes: four rows that are freed, filled, condensed and swapped."""

    def __init__(self, waiting: list[Reply], choice: random.Random) -> None:
        self.waiting = waiting
        self.choice = choice
        self.rows: list[Reply] = []

    def update(self) -> BatchUpdate | None:
        """One step's changes: replies end or are preempted, others join, the rows close up, two may change places."""
        builder = BatchUpdateBuilder()
        for row in reversed(range(len(self.rows))):
            language, tokens, output = self.rows[row]
            done = len(output) == len(tokens)
            if not done and self.choice.random() < 0.1:
                # It comes back with a list of its own.
                self.waiting.append((language, tokens, list(output)))
                done = True
            if done:
                builder.removed_append(row)
        kept: list[Reply | None] = [None if row in builder.removed else reply for row, reply in enumerate(self.rows)]
        self._fill(kept, builder)
        self._condense(kept, builder)
        self.rows = [reply for reply in kept if reply is not None]
        if len(self.rows) > 1 and self.choice.random() < 0.3:
            self.rows[0], self.rows[-1] = self.rows[-1], self.rows[0]
            builder.moved.append((0, len(self.rows) - 1, MoveDirectionality.SWAP))
        return builder.get_and_reset(len(self.rows))

    def _fill(self, kept: list[Reply | None], builder: BatchUpdateBuilder) -> None:
        while self.waiting and sum(reply is not None for reply in kept) < 4:
            reply, freed = self.waiting.pop(0), builder.pop_removed()
            row = len(kept) if freed is None else freed
            kept[row:] = [reply, *kept[row + 1 :]]
            builder.added.append((row, params(reply[0]), [], reply[2]))

    def _condense(self, kept: list[Reply | None], builder: BatchUpdateBuilder) -> None:
        while None in kept:
            hole, last = kept.index(None), len(kept) - 1
            if kept[last] is not None:
                kept[hole] = kept[last]
                builder.moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
            kept.pop()


def test_v1_keeps_each_reply_apart_through_any_batch(v1: V1Guard, tables: Tables, tokenizer: Any) -> None:
    batch = Batch([(language, tokens, []) for language, tokens in replies(tokenizer) * 4], random.Random(5))
    while True:
        v1.update_state(batch.update())
        if not batch.rows:
            break
        masks = v1.apply(free(tables, len(batch.rows)))
        for row, (language, tokens, output) in enumerate(batch.rows):
            assert torch.equal(masks[row], expected(tables, language, output)), (row, output)
            output.append(tokens[len(output)])
    assert not batch.waiting


# --- V2 ---------------------------------------------------------------------------------------------------------


class Requests:
    """What the V2 runner shows of its requests, on a CPU: slots with a prompt and the tokens filled in at the start."""

    def __init__(self, slots: int) -> None:
        self.device = CPU
        self.max_num_reqs = slots
        self.prompt_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.prefill_len = SimpleNamespace(np=np.zeros(slots, dtype=np.int32))
        self.all_token_ids = SimpleNamespace(gpu=torch.zeros((slots, 100), dtype=torch.int32))

    def fill(self, slot: int, prompt: list[int], output: list[int]) -> None:
        tokens = [*prompt, *output]
        self.prompt_len.np[slot], self.prefill_len.np[slot] = len(prompt), len(tokens)
        self.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)


def context(slots: list[int], tokens: list[int], positions: list[int]) -> LogitsContext:
    """A step whose rows are `slots`, each with the token that was its input and that token's position."""
    mapping = torch.tensor(slots)
    return LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
        input_ids=torch.tensor(tokens, dtype=torch.int32),
        pos=torch.tensor(positions),
        seq_lens_upper_bound_np=np.array(positions) + 1,
    )


PROMPT = [5, 6, 7]


@pytest.fixture
def v2(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> tuple[V2Guard, Requests]:
    monkeypatch.setattr(engine_guard, "_tables", lambda config, device: tables)
    requests: Any = Requests(6)
    config: Any = None
    return V2Guard(config, requests), requests


def test_v2_follows_the_tokens_of_each_slot(v2: tuple[V2Guard, Requests], tables: Tables, tokenizer: Any) -> None:
    guard, requests = v2
    given = replies(tokenizer)
    for slot, (language, _) in enumerate(given):
        requests.fill(slot, PROMPT, [])
        assert guard.add_request(slot, params(language)) == (language is not None)
    guard.apply_staged_writes()
    slots = list(range(len(given)))
    for step in range(min(len(tokens) for _, tokens in given)):
        choice = random.Random(step)
        choice.shuffle(slots)
        inputs = [given[slot][1][step - 1] if step else PROMPT[-1] for slot in slots]
        masks = guard.apply(free(tables, len(slots)), context(slots, inputs, [len(PROMPT) - 1 + step] * len(slots)))
        for row, slot in enumerate(slots):
            language, tokens = given[slot]
            assert torch.equal(masks[row], expected(tables, language, tokens[:step])), (slot, step)
        guard.apply_staged_writes()


def test_v2_takes_nothing_of_a_prompt_that_comes_in_chunks(v2: tuple[V2Guard, Requests], tables: Tables) -> None:
    guard, requests = v2
    requests.fill(2, PROMPT, [])
    guard.add_request(2, params("ar"))
    guard.apply_staged_writes()
    for position, token in enumerate(PROMPT):
        masks = guard.apply(free(tables, 1), context([2], [token], [position]))
        assert torch.equal(masks[0], expected(tables, "ar", []))


def test_v2_replays_a_preempted_reply_into_its_new_slot(
    v2: tuple[V2Guard, Requests], tables: Tables, tokenizer: Any
) -> None:
    guard, requests = v2
    tokens = tokenizer.encode(" تناول Panadol every six", add_special_tokens=False)
    requests.fill(3, PROMPT, tokens[:-1])
    guard.add_request(3, params("ar"))
    guard.apply_staged_writes()
    end = len(PROMPT) + len(tokens) - 1
    masks = guard.apply(free(tables, 1), context([3], [tokens[-2]], [end - 1]))
    assert torch.equal(masks[0], expected(tables, "ar", tokens[:-1]))
    masks = guard.apply(free(tables, 1), context([3], [tokens[-1]], [end]))
    assert torch.equal(masks[0], expected(tables, "ar", tokens))


def test_v2_forgets_who_was_in_a_slot_before(v2: tuple[V2Guard, Requests], tables: Tables, tokenizer: Any) -> None:
    guard, requests = v2
    for language in ("en", "ar", None, "ar"):
        requests.fill(1, PROMPT, tokenizer.encode(" نعم", add_special_tokens=False) if language == "en" else [])
        guard.add_request(1, params(language))
        guard.apply_staged_writes()
        logits = free(tables, 1)
        masks = guard.apply(logits, context([1], [PROMPT[-1]], [len(PROMPT) - 1]))
        if language != "en":
            assert torch.equal(masks[0], expected(tables, language, []))


def test_v2_leaves_a_batch_without_guarded_replies_alone(v2: tuple[V2Guard, Requests], tables: Tables) -> None:
    guard, requests = v2
    requests.fill(0, PROMPT, [])
    assert not guard.add_request(0, params(None))
    guard.apply_staged_writes()
    logits = free(tables, 1)
    assert guard.apply(logits, context([0], [7], [3])) is logits and not logits.any()


# --- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("v2_runner", "name"), [(False, "V1Guard"), (True, "V2Guard")])
def test_the_runner_gets_its_own_class(v2_runner: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_guard, "_vocabulary", lambda model: None)
    config: Any = SimpleNamespace(
        speculative_config=None, use_v2_model_runner=v2_runner, model_config=SimpleNamespace(logits_processors=["a:B"])
    )
    engine_guard.use_guard(config)
    assert config.model_config.logits_processors == ["a:B", f"server.engine_guard:{name}"]
    assert issubclass(getattr(engine_guard, name), (V1Processor, V2Processor)[v2_runner])


def test_speculative_decoding_has_no_guard() -> None:
    config: Any = SimpleNamespace(speculative_config=object())
    with pytest.raises(ValueError, match="speculative"):
        engine_guard.use_guard(config)
