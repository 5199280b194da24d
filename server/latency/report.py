"""Tables people read: Table 5, plans, results. Markdown that is also legible in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.latency import table5
from server.latency.plan import Plan
from server.latency.results import Interval, Results
from server.latency.stats import Quantiles
from server.latency.summary import Group, StageSummary

LANGUAGE_NAMES = {"en": "English", "ar": "Arabic", "mixed": "mixed"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; all but the first are right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def draw(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])} |"

    return "\n".join([draw(lines[0]), draw(rule), *map(draw, lines[1:])])


def table5_text(source: table5.Table5, lines: list[table5.Line]) -> str:
    """Table 5 with what it means and what cannot be known."""
    header = ["Model", "Active", "Printed", "Reproduced", "Residual", "Corrected", "Ceiling", "Measured"]
    rows = [
        [
            line.row.name,
            f"{line.row.active} ({line.active_weights / 1e9:.1f}B)",
            _pair(line.row.latency_s, line.row.tokens_per_s),
            _pair(line.reproduced.latency_s, line.reproduced.tokens_per_s),
            f"{100 * line.residual:+.1f}%",
            _pair(line.corrected.latency_s, line.corrected.tokens_per_s),
            f"{line.ceiling_tokens_per_s:.1f}",
            _pair(line.measured.latency_s, line.measured.tokens_per_s) if line.measured else "",
        ]
        for line in lines
    ]
    ratios = {name: table5.advantage(lines, name) for name in ("printed", "reproduced", "corrected")}
    bimedix = next(line for line in lines if line.row.name == "BiMediX")
    assumed = [
        f"{name} assumes " + ", ".join(f"{key}={value}" for key, value in column.assumptions.model_dump().items())
        for name, column in (("Reproduced", source.reproduced), ("Corrected", source.corrected))
    ]
    verdict = (
        f"BiMediX over the 70B models: {ratios['printed']:.1f}x printed, {ratios['reproduced']:.1f}x reproduced, "
        f"{ratios['corrected']:.1f}x corrected. Its printed {bimedix.row.tokens_per_s} tokens/s is "
        f"{'above' if bimedix.row.tokens_per_s > bimedix.ceiling_tokens_per_s else 'below'} the ceiling of "
        f"{bimedix.ceiling_tokens_per_s:.1f} tokens/s ({source.corrected.assumptions.weight_bits}-bit weights, one "
        f"{source.corrected.assumptions.gpu})."
    )
    title = "Batch 1; latency in seconds and tokens per second; active parameters printed (counted)."
    return "\n".join([title, "", table(header, rows), "", verdict, "", *(f"- {t}" for t in [*assumed, *source.notes])])


def _pair(seconds: float, rate: float) -> str:
    return f"{seconds:.1f} s {rate:6.1f}"


def plan_text(plan: Plan, title: str) -> str:
    """A plan: memory first, then speed."""
    share = f"{plan.weight_bytes / 1e9:.1f} GB of weights, {plan.memory_bytes / 1e9:.1f} GB usable"
    if not plan.fits:
        return f"{title}\n\nDoes not fit: {share}."
    held = ", ".join(f"{count} of {length} tokens" for length, count in plan.conversations.items())
    speeds = table(
        ["Batch", "tokens/s", "English words/s", "Arabic words/s", "each: tokens/s", "English", "Arabic", "bound by"],
        [
            [
                str(speed.batch),
                f"{speed.tokens_per_s:.0f}",
                *(f"{speed.words_per_s[language]:.0f}" for language in ("en", "ar")),
                f"{speed.tokens_per_s / speed.batch:.1f}",
                *(f"{speed.words_per_s[language] / speed.batch:.1f}" for language in ("en", "ar")),
                speed.limit if speed.fits else "KV cache full",
            ]
            for speed in plan.speeds
        ],
    )
    return "\n".join(
        [
            title,
            "",
            f"Fits: {share}. {plan.kv_tokens:,} KV tokens left at {plan.kv_bytes_per_token:,.0f} bytes each.",
            f"Conversations at once: {held}.",
            "",
            "Best case (no kernel, scheduling or network overhead), whole batch and each conversation:",
            "",
            speeds,
        ]
    )


def results_text(results: Results) -> str:
    """A results file as Markdown."""
    parts = [_heading(results)]
    if results.kind == "compare":
        parts.append(_comparisons(results))
    else:
        parts += [_stages(results.stages), _languages(results.stages)]
    if any(stage.turns for stage in results.stages):
        parts.append(_turns(results.stages))
    if results.knee:
        parts.append(f"Knee: {results.knee:g} concurrent requests reach 90% of the best throughput measured.")
    return "\n\n".join([*parts, *_warnings(results)])


def _heading(results: Results) -> str:
    targets = [
        f"- {target.name or 'endpoint'}: {target.url}, model {target.model}"
        + (f", checkpoint {target.checkpoint}" if target.checkpoint else "")
        + (f", flags {target.flags}" if target.flags else "")
        for target in results.targets
    ]
    machine = results.machine
    where = ", ".join([machine.processor, f"{machine.cores} cores", f"{machine.memory_gb:g} GB", *machine.gpus])
    return "\n".join([f"# Latency, {results.created}", "", *targets, f"- load from: {where}", f"- `{results.command}`"])


def _stages(stages: list[StageSummary]) -> str:
    header = ["Load", "ok", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "tokens/s", "goodput/s", "hits", "queue"]
    return "Milliseconds; rates per second while load was full.\n\n" + table(header, [_stage(s) for s in stages])


def _stage(stage: StageSummary) -> list[str]:
    total, server = stage.total, stage.server
    return [
        f"{stage.mode} {stage.endpoint + ' ' if stage.endpoint else ''}{stage.level:g}",
        f"{total.ok}/{total.requests}",
        *_tail(total.ttft_ms),
        *_tail(total.tpot_ms),
        _number(total.itl_ms["p99"] if total.itl_ms else None),
        _number(total.tokens_per_s),
        _number(total.goodput_per_s),
        f"{100 * server.prefix_hit_rate:.0f}%" if server and server.prefix_hit_rate is not None else "",
        _number(server.queue_mean_ms if server else None),
    ]


def _languages(stages: list[StageSummary]) -> str:
    header = ["Load, prompt language", "ok", "TTFT p50", "TPOT p50", "each: tokens/s", "characters/s", "words/s"]
    rows = [
        [f"{stage.endpoint} {stage.level:g} {LANGUAGE_NAMES.get(language, language)}".strip(), *_stream(found)]
        for stage in stages
        for language, found in stage.languages.items()
    ]
    return "What one reader gets, by language of the prompt.\n\n" + table(header, rows)


def _turns(stages: list[StageSummary]) -> str:
    header = ["Users, turn", "ok", "TTFT p50", "TPOT p50", "each: tokens/s", "characters/s", "words/s"]
    rows = [[f"{stage.level:g}, {turn}", *_stream(found)] for stage in stages for turn, found in stage.turns.items()]
    return "By turn of the conversation.\n\n" + table(header, rows)


def _stream(found: Group) -> list[str]:
    rates = (found.stream_tokens_per_s, found.stream_characters_per_s, found.stream_words_per_s)
    return [f"{found.ok}/{found.requests}", _tail(found.ttft_ms)[0], _tail(found.tpot_ms)[0], *map(_number, rates)]


def _comparisons(results: Results) -> str:
    header = ["Users", "rounds", "tokens/s A", "B", "A / B", "TTFT A", "B", "A - B, ms", "TPOT A / B", "failed A", "B"]
    rows = [
        [
            f"{found.level:g}",
            str(found.rounds),
            *(_number(found.tokens_per_s[name]) for name in "AB"),
            _interval(found.throughput_ratio, 3),
            *(_number(found.ttft_ms[name]) for name in "AB"),
            _interval(found.ttft_added_ms, 2),
            _interval(found.tpot_ratio, 3),
            *(str(found.failures[name]) for name in "AB"),
        ]
        for found in results.comparisons
    ]
    return "A against B, with 95% intervals over interleaved rounds.\n\n" + table(header, rows)


def _warnings(results: Results) -> list[str]:
    found = []
    for stage in results.stages:
        label = f"stage {stage.number} ({stage.mode} {stage.level:g})"
        if stage.total.failures:
            counts = ", ".join(f"{count} {name}" for name, count in stage.total.failures.items())
            found.append(f"- {label}: failed: {counts}")
        if stage.client.saturated:
            found.append(
                f"- {label}: the load generator was saturated (event loop late by {stage.client.lag_p99_ms:.0f} ms at "
                f"p99, {100 * stage.client.cpu_share:.0f}% of a core): latencies include its own delay"
            )
    return ["Read with care:\n\n" + "\n".join(found)] if found else []


def _tail(found: Quantiles | None) -> list[str]:
    return [_number(found.p50), _number(found.p99)] if found else ["", ""]


def _interval(found: Interval, digits: int) -> str:
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
