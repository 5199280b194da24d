"""`bimedix latency`: table5, plan, run, compare. Everything heavy is imported when a command runs."""

# Typer commands take their options as parameters, always by name.

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.latency.measure import Watcher
    from server.latency.results import Results

app = typer.Typer(
    help="Where the paper's Table 5 comes from, what hardware can do, and what a service does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]


@app.command()
def table5(
    assume: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE in both computed columns, or reproduced.KEY=VALUE, corrected.KEY=VALUE."),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="A results file of `run --mode table5`, as measured.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Table 5 of the paper: printed, reproduced, corrected, and the ceiling of the hardware."""
    from server.latency import report
    from server.latency import table5 as source

    with _usage_errors():
        table = source.load().assume(assume or [])
        lines = source.lines(table, source.measured(results) if results else None)
    typer.echo(report.table5_text(table, lines))
    if as_json:
        columns = table.model_dump(include={"reproduced": {"assumptions"}, "corrected": {"assumptions"}})
        _emit({"rows": [line.model_dump() for line in lines], **columns})


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, a100-80gb-pcie, h100-80gb, h200, l40s or l4.")],
    count: Annotated[int, typer.Option(min=1, help="GPUs in tensor parallel.")] = 1,
    dtype: Annotated[str, typer.Option(help="Width of the weights: bf16, fp8, int8, int4.")] = "bf16",
    model: Annotated[str, typer.Option(help="A bundled shape, or a checkpoint directory.")] = "mixtral-8x7b",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory; otherwise the checkpoint's, or Mixtral's figures.")
    ] = None,
    length: Annotated[
        str, typer.Option(help="Conversation lengths in tokens; speeds are for the first.")
    ] = "2048,8192",
    utilization: Annotated[float, typer.Option(help="Share of GPU memory that vLLM may use.")] = 0.92,
    reserve_gb: Annotated[float, typer.Option(help="Kept for activations and CUDA graphs, per GPU.")] = 3.0,
    as_json: JsonFlag = False,
) -> None:
    """Does it fit, how many conversations, and how fast at best, in tokens and in English and Arabic words."""
    from server.latency import fertility, report, shapes
    from server.latency import plan as planner

    checkpoint = Path(model) if Path(model).is_dir() else None
    with _usage_errors():
        shape = shapes.shape_of(checkpoint) if checkpoint else shapes.pick(shapes.models(), model, "model")
        folder = tokenizer or checkpoint
        words = fertility.measure(fertility.tokenizer(folder)) if folder else fertility.MIXTRAL
        deployment = planner.Deployment(
            shape, shapes.pick(shapes.gpus(), gpu, "GPU"), count, shapes.checked_dtype(dtype)
        )
        budget = planner.Budget(utilization=utilization, reserve_gb=reserve_gb)
        found = planner.make_plan(deployment, [int(text) for text in length.split(",")], words, budget)
    typer.echo(report.plan_text(found, f"{model} in {dtype} on {count} x {gpu}"))
    if as_json:
        _emit({**found.model_dump(), "fertility": {key: value.model_dump() for key, value in words.items()}})


Levels = Annotated[str, typer.Option(help="Users at once, as a list; the last is a sweep's highest.")]
Languages = Annotated[str, typer.Option(help="Prompt languages in turn: en, ar, mixed.")]
PromptWords = Annotated[str, typer.Option(help="Prompt lengths in words, in turn.")]
ReplyTokens = Annotated[int, typer.Option(min=1, help="Reply length in tokens.")]
Natural = Annotated[bool, typer.Option("--natural", help="Let replies end by themselves, up to that length.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests in a stage, and at least two for every user.")]
Seconds = Annotated[float, typer.Option(help="A stage starts no request after this.")]
MaxRequests = Annotated[int, typer.Option(min=1, help="Requests over all stages.")]
MaxSeconds = Annotated[float, typer.Option(help="No request starts after this, over all stages.")]
Timeout = Annotated[float, typer.Option(help="Seconds before a request counts as failed.")]
Seed = Annotated[int, typer.Option(help="Of prompts, arrivals and think times.")]
AllowRemote = Annotated[bool, typer.Option("--allow-remote", help="Load another machine than this one.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results.json, requests.csv, report.md and pictures.")]
Flags = Annotated[str, typer.Option(help="How the server was started; kept in the results file.")]


@app.command()
def run(
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name; otherwise the first that the endpoint lists.")] = "",
    mode: Annotated[str, typer.Option(help="closed, open, sweep, conversations or table5.")] = "closed",
    concurrency: Levels = "1,8,32",
    rate: Annotated[str, typer.Option(help="Open loop: requests a second on average, as a list.")] = "1,2,4",
    languages: Languages = "en,ar",
    prompt_words: PromptWords = "60",
    reply_tokens: ReplyTokens = 128,
    natural: Natural = False,
    turns: Annotated[int, typer.Option(min=1, help="Conversations: turns in each.")] = 4,
    think: Annotated[float, typer.Option(min=0, help="Conversations: mean think time in seconds.")] = 1.0,
    requests: Requests = 32,
    seconds: Seconds = 60.0,
    max_requests: MaxRequests = 5000,
    max_seconds: MaxSeconds = 1800.0,
    timeout: Timeout = 120.0,
    ttft_limit: Annotated[float, typer.Option(help="Goodput: milliseconds to the first text.")] = 1000.0,
    tpot_limit: Annotated[float, typer.Option(help="Goodput: milliseconds per token after it.")] = 100.0,
    seed: Seed = 0,
    flags: Flags = "",
    allow_remote: AllowRemote = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Load an endpoint and measure what its users would see. BIMEDIX_API_KEY is sent when it is set."""
    from server.latency import measure
    from server.latency.summary import Limits

    table5_mode = mode == "table5"
    with _usage_errors():
        side = measure.Side(url=url, model=model, flags=flags)
        wanted = measure.Plan.model_validate(
            {
                "mode": mode,
                "levels": [1.0] if table5_mode else _numbers(rate if mode == "open" else concurrency),
                "languages": languages.split(","),
                "prompt_words": [int(text) for text in prompt_words.split(",")],
                "reply_tokens": measure.TABLE5_TOKENS if table5_mode else reply_tokens,
                "fixed_length": table5_mode or not natural,
                "requests": requests,
                "seconds": seconds,
                "max_requests": max_requests,
                "max_seconds": max_seconds,
                "timeout_s": timeout,
                "turns": turns,
                "think_s": think,
                "seed": seed,
                "limits": Limits(ttft_ms=ttft_limit, tpot_ms=tpot_limit),
            }
        )
    with _watcher() as watcher:
        found = _measured(measure.run(side, wanted, allow_remote=allow_remote, command=_command(), watcher=watcher))
    _deliver(found, out, as_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="The endpoint in question.")],
    b: Annotated[str, typer.Argument(help="The endpoint it is held against.")],
    model_a: Annotated[str, typer.Option(help="Model name at A; otherwise the first it lists.")] = "",
    model_b: Annotated[str, typer.Option(help="Model name at B; otherwise the first it lists.")] = "",
    concurrency: Levels = "1,8,32,64",
    rounds: Annotated[int, typer.Option(min=2, help="Pairs of stages at each concurrency, A B then B A.")] = 8,
    languages: Languages = "en,ar",
    prompt_words: PromptWords = "60",
    reply_tokens: ReplyTokens = 128,
    natural: Natural = False,
    requests: Requests = 16,
    seconds: Seconds = 30.0,
    max_requests: MaxRequests = 20000,
    max_seconds: MaxSeconds = 3600.0,
    timeout: Timeout = 120.0,
    seed: Seed = 0,
    flags_a: Flags = "",
    flags_b: Flags = "",
    allow_remote: AllowRemote = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure two endpoints in turns and give ratios with confidence intervals; drift of the machine cancels."""
    from server.latency import measure

    with _usage_errors():
        wanted = measure.Plan.model_validate(
            {
                "levels": _numbers(concurrency),
                "languages": languages.split(","),
                "prompt_words": [int(text) for text in prompt_words.split(",")],
                "reply_tokens": reply_tokens,
                "fixed_length": not natural,
                "requests": requests,
                "seconds": seconds,
                "max_requests": max_requests,
                "max_seconds": max_seconds,
                "timeout_s": timeout,
                "rounds": rounds,
                "seed": seed,
            }
        )
    first = measure.Side(name="A", url=a, model=model_a, flags=flags_a)
    second = measure.Side(name="B", url=b, model=model_b, flags=flags_b)
    with _watcher() as watcher:
        found = _measured(
            measure.compare(first, second, wanted, allow_remote=allow_remote, command=_command(), watcher=watcher)
        )
    _deliver(found, out, as_json)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn what is wrong with the flags into a usage error of one line."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(f"{where}: {first['msg']}" if where else first["msg"]) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _command() -> str:
    return shlex.join(["bimedix", *sys.argv[1:]])


def _measured(work: Coroutine[Any, Any, Results]) -> Results:
    """Run to the end. Ends the process with one line when the endpoint cannot be measured."""
    from server.latency.endpoint import EndpointError

    try:
        return asyncio.run(work)
    except EndpointError as error:
        typer.secho(f"bimedix latency: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _watcher() -> Iterator[Watcher]:
    from server.latency.progress import Bars, Lines

    if not sys.stderr.isatty():
        yield Lines()
        return
    with Bars() as bars:
        yield bars


def _deliver(results: Results, out: Path | None, as_json: bool) -> None:
    """Print the report, write the files, and end with JSON without the single requests."""
    from server.latency import report

    text = report.results_text(results)
    typer.echo(text)
    if out:
        from server.latency import pictures
        from server.latency.results import write_csv

        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(results.model_dump_json(indent=1), encoding="utf-8")
        (out / "report.md").write_text(text + "\n", encoding="utf-8")
        write_csv(results.requests, out / "requests.csv")
        drawn = pictures.draw(results, out)
        typer.echo(f"Written to {out}: results.json, report.md, requests.csv, {', '.join(path.name for path in drawn)}")
    if as_json:
        _emit(results.model_dump(mode="json", exclude={"requests"}))


def _emit(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False))
