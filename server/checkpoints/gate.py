"""What new weights have to show before anyone sees them: canary prompts in both languages, measured and judged."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.checkpoints.serving import Serving
from server.language import Language
from server.language.guide import guide
from server.language.score import judge as judge_language
from server.language.score import pass_rates

if TYPE_CHECKING:
    from server.engine import Engine, Sample

DEFAULT = Path(__file__).parent / "canaries.yaml"
GRAM = 3
"""Tokens in a row whose repetition shows that a text goes round in circles."""
ENOUGH_GRAMS = 12


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Canary(Strict):
    """A question, and a good reply to it that perplexity is measured on."""

    language: Language
    prompt: str = Field(min_length=1)
    reply: str = Field(min_length=1)


class Limits(Strict):
    max_tokens: int = Field(ge=1)
    language_pass_rate: float = Field(ge=0, le=1)
    degenerate_replies: float = Field(ge=0, le=1)
    perplexity_ratio: float = Field(gt=0)
    used_experts: float = Field(ge=1)


class Canaries(Strict):
    limits: Limits
    canaries: tuple[Canary, ...] = Field(min_length=1)


def read_canaries(path: Path | None) -> Canaries:
    """The canaries in a YAML file, or the bundled ones. Raises ValueError for a file of another form."""
    path = path or DEFAULT
    try:
        return Canaries.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the canaries {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the canaries {path}: {where}: {first['msg']}") from None


@dataclass(frozen=True)
class Measured:
    """A checkpoint's showing. Pass rates and perplexities are by language; `used_experts` is by layer."""

    finite: bool
    degenerate: float
    language_pass_rate: dict[Language, float]
    perplexity: dict[Language, float]
    used_experts: list[float]
    """The exponential of the entropy of each router's choices; empty where the engine can't be watched."""

    def as_json(self) -> dict[str, Any]:
        """Rounded, and without what is not a number, which JSON has no word for."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bool):
        return value
    return round(value, 4) if math.isfinite(value) else None


async def measure(engine: Engine, serving: Serving, canaries: Canaries) -> Measured:
    """Ask the engine, past the turnstile, whose weights are those of `serving`."""
    asked = [
        guide([{"role": "user", "content": canary.prompt}], "auto", serving.directives)[0]
        for canary in canaries.canaries
    ]
    await engine.watch_router()
    try:
        replies = await asyncio.gather(*(engine.reply(messages, canaries.limits.max_tokens) for messages in asked))
        pairs = zip(asked, canaries.canaries, strict=True)
        scores = await asyncio.gather(*(engine.score(messages, canary.reply) for messages, canary in pairs))
    finally:
        counts = await engine.read_router()
    logprobs = [*(reply.logprobs for reply in replies), *scores]
    return Measured(
        finite=all(math.isfinite(one) for some in logprobs for one in some),
        degenerate=sum(map(is_degenerate, replies)) / len(replies),
        language_pass_rate=_by_language(canaries, replies, _pass_rate),
        perplexity=_by_language(canaries, scores, lambda _, given: perplexity(given)),
        used_experts=[used_experts(chosen) for chosen in counts],
    )


def _by_language(canaries: Canaries, values: Sequence[Any], summary: Any) -> dict[Language, float]:
    grouped: dict[Language, list[Any]] = {}
    for canary, value in zip(canaries.canaries, values, strict=True):
        grouped.setdefault(canary.language, []).append(value)
    return {language: summary(language, given) for language, given in grouped.items()}


def _pass_rate(language: Language, replies: list[Sample]) -> float:
    """Of all replies: one without a word of any language does not pass."""
    return pass_rates(judge_language(reply.text, language) for reply in replies).passed_lines / len(replies)


def is_degenerate(reply: Sample) -> bool:
    """Whether a reply is empty, or at least half of it is what it has said already."""
    grams = [tuple(reply.tokens[i : i + GRAM]) for i in range(len(reply.tokens) - GRAM + 1)]
    circles = len(grams) >= ENOUGH_GRAMS and len(set(grams)) * 2 <= len(grams)
    return not reply.text or circles


def perplexity(logprobs: Iterable[list[float]]) -> float:
    """Over all tokens of all replies."""
    flat = [one for some in logprobs for one in some]
    mean = -sum(flat) / len(flat)
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def used_experts(chosen: list[int]) -> float:
    """How many experts a router makes use of: all of them when it uses them alike, fewer the more it leans."""
    total = sum(chosen)
    shares = [count / total for count in chosen if count]
    return math.exp(-sum(share * math.log(share) for share in shares))


def judge(new: Measured, old: Measured, limits: Limits, top_k: int) -> list[str]:
    """What is wrong with the new checkpoint, for people; nothing when it may be shown."""
    problems = []
    if not new.finite:
        problems.append("its log probabilities are not all finite numbers")
    if new.degenerate > limits.degenerate_replies:
        problems.append(f"{new.degenerate:.0%} of its replies are empty or go round in circles")
    for language, rate in new.language_pass_rate.items():
        if rate < limits.language_pass_rate:
            problems.append(f"{rate:.0%} of its replies are in the language they should be in ({language})")
        ratio = new.perplexity[language] / old.perplexity[language]
        if not ratio <= limits.perplexity_ratio:
            problems.append(
                f"its perplexity is {ratio:.2f} times the previous checkpoint's ({language}; "
                f"at most {limits.perplexity_ratio:g})"
            )
    least = min(new.used_experts, default=math.inf)
    if least < limits.used_experts * top_k:
        problems.append(f"a router has collapsed: it uses {least:.2f} experts where {top_k} see each token")
    return problems
