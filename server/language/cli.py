"""`bimedix language`: score replies, and try the language policies on a running service."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from server.language.score import PassRates
    from server.language.trial import Outcome

app = typer.Typer(help="Whether replies are in the language they should be in.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
HEADER = f"{'expected':>10}{'replies':>9}{'judged':>8}{'line-level':>12}{'word-level':>12}"


@app.command()
def score(
    replies: Annotated[Path, typer.Argument(help='A line each: {"expected": "en" or "ar", "reply": "..."}.')],
    as_json: AsJson = False,
) -> None:
    """Line- and word-level pass rates of replies, as the Language Confusion Benchmark defines them."""
    from server.language.score import score_jsonl

    try:
        rates = score_jsonl(replies)
    except (OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(HEADER)
    for language, found in rates.items():
        typer.echo(_line(language, found))
    if as_json:
        typer.echo(json.dumps({language: _numbers(found) for language, found in rates.items()}))


@app.command()
def trial(
    url: Annotated[str, typer.Option(help="The service to try.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="BIMEDIX_API_KEY", help="Key, where it asks for one.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Ask for 204 English and 204 Arabic replies that conversations pull the other way, under each policy."""
    from openai import OpenAIError
    from transformers import AutoTokenizer

    from server.language.trial import EXPECTED, POLICIES, allowed_terms, cases, run
    from server.settings import EMBEDDED_CHECKPOINT

    requests = len(POLICIES) * sum(len(list(cases(expected))) for expected in EXPECTED)
    try:
        with typer.progressbar(length=requests, label="Replies", file=sys.stderr) as bar:
            outcomes = asyncio.run(run(url, api_key, lambda: bar.update(1)))
    except OpenAIError as error:
        _fail(f"{url}: {error}")
    terms = allowed_terms(AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT))
    typer.echo(f"{'policy':<8}{HEADER}{'tokens/s':>10}")
    for outcome in outcomes:
        rest = f"{outcome.tokens_per_second:>10.0f}"
        typer.echo(f"{outcome.policy:<8}{_line(outcome.expected, outcome.rates)}{rest}")
    allowed = sum(terms.values())
    typer.echo(f"{allowed} of {len(terms)} terms can be named in Arabic (embedded vocabulary).{_refused(terms)}")
    if as_json:
        typer.echo(json.dumps({"outcomes": [_outcome(one) for one in outcomes], "terms": terms}))


def _line(language: str, rates: PassRates) -> str:
    shares = f"{rates.line_level:>12.1%}{rates.word_level:>12.1%}"
    return f"{language:>10}{rates.replies:>9}{rates.judged:>8}{shares}"


def _numbers(rates: PassRates) -> dict[str, float]:
    return {**rates._asdict(), "line_level": rates.line_level, "word_level": rates.word_level}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {**outcome._asdict(), "rates": _numbers(outcome.rates)}


def _refused(terms: dict[str, bool]) -> str:
    refused = [term for term, allowed in terms.items() if not allowed]
    return f" Refused: {', '.join(refused)}." if refused else ""


def _fail(message: str) -> NoReturn:
    typer.echo(f"bimedix: {message}", err=True)
    raise typer.Exit(2)
