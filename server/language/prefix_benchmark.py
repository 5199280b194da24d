"""What a change of language costs in the prefix cache: our directives against one in the system message."""

from __future__ import annotations

import itertools
import re
import urllib.request
from collections.abc import Callable
from typing import Any

from server.language import Language
from server.language.guide import UNKNOWN_CHECKPOINT, guide
from server.language.trial import CONDITIONS, QUESTIONS, REPLIES

Messages = list[dict[str, str]]

SYSTEM = "You are a careful medical assistant. You answer patients' questions in general terms."
LANGUAGES: dict[str, list[tuple[Language, ...]]] = {
    "never": [("en",) * 8, ("ar",) * 8],
    "twice": [("en",) * 3 + ("ar",) * 3 + ("en",) * 2, ("ar",) * 3 + ("en",) * 3 + ("ar",) * 2],
}
"""Languages of the eight turns: without a switch and with two, each from either language, so that lengths agree."""


def prefix_shares(url: str | None) -> list[dict[str, Any]]:
    """A row for each way of asking for a language, with and without switches."""
    rows: list[dict[str, Any]] = []
    styles = {"in the last turn": _in_turn, "in the system message": _in_system}
    for (style, prompt), switches in itertools.product(styles.items(), LANGUAGES):
        row = {"directive": style, "switches": switches, "shared tokens": f"{_shared_tokens(prompt, switches):.1%}"}
        if url is not None:
            row["service's hit rate"] = f"{_service_hits(url, prompt, switches):.1%}"
        rows.append(row)
    return rows


def _in_turn(messages: Messages, language: Language) -> Messages:
    guided, _ = guide(messages, "auto", UNKNOWN_CHECKPOINT)
    return guided


def _in_system(messages: Messages, language: Language) -> Messages:
    system = messages[0]["content"]
    return [{"role": "system", "content": f"{system} {UNKNOWN_CHECKPOINT.texts[language]}"}, *messages[1:]]


Prompt = Callable[[Messages, Language], Messages]


def _conversations(switches: str) -> list[tuple[int, tuple[Language, ...]]]:
    return [(number, turns) for number in range(5) for turns in LANGUAGES[switches]]


def _question(number: int, turn: int, language: Language) -> str:
    condition = CONDITIONS[(number * 2 + turn // len(QUESTIONS)) % len(CONDITIONS)]
    return QUESTIONS[turn % len(QUESTIONS)][language].format(condition[language])


def _shared_tokens(prompt: Prompt, switches: str) -> float:
    """The share of prompt tokens that the conversation's last prompt and reply began with."""
    from transformers import AutoTokenizer

    from server.settings import EMBEDDED_CHECKPOINT

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    template = (EMBEDDED_CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8")
    shared = total = 0
    for number, turns in _conversations(switches):
        messages: Messages = [{"role": "system", "content": SYSTEM}]
        cached: list[int] = []
        for turn, language in enumerate(turns):
            messages.append({"role": "user", "content": _question(number, turn, language)})
            rendered = prompt(messages, language)
            tokens = tokenizer.apply_chat_template(rendered, chat_template=template, return_dict=False)
            shared += _common(cached, tokens)
            total += len(tokens)
            messages.append({"role": "assistant", "content": REPLIES[language]})
            cached = tokens + tokenizer.encode(f" {REPLIES[language]}{tokenizer.eos_token}", add_special_tokens=False)
    return shared / total


def _common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _service_hits(url: str, prompt: Prompt, switches: str) -> float:
    """The share of prompt tokens that the service had in its prefix cache, by its own metrics.

    Every conversation begins with its own name, or one would find the blocks of another.
    """
    from openai import OpenAI

    hits, queries = _counters(url)
    with OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", timeout=600) as client:
        model = client.models.list().data[0].id
        for number, turns in _conversations(switches):
            name = f"{prompt.__name__} {switches} {number} {turns[0]} {hits}."
            messages: Messages = [{"role": "system", "content": f"{name} {SYSTEM}"}]
            for turn, language in enumerate(turns):
                messages.append({"role": "user", "content": _question(number, turn, language)})
                answer = client.chat.completions.create(
                    model=model,
                    messages=prompt(messages, language),  # type: ignore[arg-type]
                    max_tokens=32,
                    temperature=0,
                    extra_body={"language_policy": "off"},
                )
                reply = answer.choices[0].message.content or ""
                messages.append({"role": "assistant", "content": reply.strip() or REPLIES[language]})
    hits_after, queries_after = _counters(url)
    return (hits_after - hits) / (queries_after - queries)


def _counters(url: str) -> tuple[float, float]:
    with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=60) as response:  # noqa: S310
        text = response.read().decode()
    names = ("hits", "queries")
    found = [re.findall(rf"^vllm:prefix_cache_{name}_total\{{[^}}]*\}} (\S+)", text, re.MULTILINE) for name in names]
    return sum(map(float, found[0])), sum(map(float, found[1]))
