"""What the guard adds to a decoding step, and what a step of a running service takes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

BATCHES = (1, 8, 32, 64)
STEPS = 200
WORDS = "The patient should rest and drink water. يجب أن يستريح المريض ويشرب الماء. Panadol 500 mg\n"


def guard_steps(url: str | None) -> list[dict[str, Any]]:
    """A row for each batch size: median microseconds to take a token of every reply and to mask the next."""
    from transformers import AutoTokenizer

    from server.language.guard import Tables
    from server.language.token_classes import read_vocabulary
    from server.settings import EMBEDDED_CHECKPOINT

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    tables = Tables(read_vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id]))
    tokens = tokenizer.encode(WORDS, add_special_tokens=False)
    rows = []
    for batch in BATCHES:
        row: dict[str, Any] = {"batch": batch, **_times(tables, tokens, batch)}
        if url is not None:
            step = asyncio.run(_service_step(url, batch))
            row |= {"step ms": round(step * 1e3, 2), "share of a step": f"{row['guard us'] / step / 1e6:.1%}"}
        rows.append(row)
    return rows


def _times(tables: Any, tokens: list[int], batch: int) -> dict[str, float]:
    import torch

    from server.language.guard import ARABIC, ENGLISH, Guard

    guard, slots = Guard(tables, batch), torch.arange(batch)
    guard.begin(list(range(batch)), [(ENGLISH, ARABIC)[slot % 2] for slot in range(batch)])
    logits = torch.zeros(batch, tables.bias.shape[1])
    steps = [torch.tensor([tokens[(step + slot) % len(tokens)] for slot in range(batch)]) for step in range(STEPS)]
    advance = [_seconds(lambda: guard.advance(slots, step)) for step in steps]  # noqa: B023
    mask = [_seconds(lambda: guard.mask(slots, logits)) for _ in steps]
    times = {"advance us": statistics.median(advance) * 1e6, "mask us": statistics.median(mask) * 1e6}
    return {name: round(value, 1) for name, value in {**times, "guard us": sum(times.values())}.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


async def _service_step(url: str, batch: int) -> float:
    """Seconds between two tokens of a reply, with `batch` replies at once, unguarded; a median over all of them."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", timeout=600) as client:
        model = (await client.models.list()).data[0].id
        gaps = await asyncio.gather(*(_gaps(client, model, number) for number in range(batch)))
    return statistics.median(gap for reply in gaps for gap in reply)


async def _gaps(client: Any, model: str, number: int) -> list[float]:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"What is asthma? ({number})"}],
        max_tokens=STEPS,
        stream=True,
        extra_body={"ignore_eos": True, "language_policy": "off"},
    )
    times = [time.perf_counter() async for _ in stream]
    # The first gaps hold other replies' prompts, the last ones fewer replies.
    middle = times[len(times) // 4 : len(times) * 3 // 4]
    return [after - before for before, after in pairwise(middle)]
