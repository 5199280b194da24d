"""Pictures of a results file: latency percentiles, throughput against concurrency, languages, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.latency.results import Results
from server.latency.summary import Group, StageSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"en": "#1f6f8b", "ar": "#c8553d", "mixed": "#6b8e4e", "A": "#1f6f8b", "B": "#c8553d", "": "#1f6f8b"}
NAMES = {"en": "English", "ar": "Arabic", "mixed": "mixed"}
Value = Callable[[StageSummary], float | None]
SHARES = ("p50", "p90", "p95", "p99")


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every picture that these results have data for; the paths written."""
    wanted: dict[str, Callable[[list[Axes], Results], None] | None] = {
        "latency.png": _latency if any(s.total.ttft_ms for s in results.stages) else None,
        "throughput.png": _throughput if len({s.level for s in results.stages}) > 1 else None,
        "languages.png": _languages if any(s.languages for s in results.stages) else None,
        "comparison.png": _comparison if results.comparisons else None,
    }
    return [_save(folder / name, paint, results) for name, paint in wanted.items() if paint]


def _save(path: Path, paint: Callable[[list[Axes], Results], None], results: Results) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 3 if paint in (_languages, _comparison) else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 4), layout="constrained")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    paint(list(axes), results)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _latency(axes: list[Axes], results: Results) -> None:
    """TTFT and TPOT percentiles against load, one line per percentile; compared endpoints get solid and dashed."""
    for axis, name, field in zip(axes, ("TTFT", "TPOT"), ("ttft_ms", "tpot_ms"), strict=True):
        for endpoint, stages in _by_endpoint(results).items():
            for shade, share in zip((1.0, 0.75, 0.55, 0.35), SHARES, strict=True):
                points = _mean_by_level(stages, _percentile(field, share))
                style = "--" if endpoint == "B" else "-"
                label = f"{endpoint} {share}".strip()
                axis.plot(*points, f"o{style}", color=COLOURS[endpoint], alpha=shade, markersize=4, label=label)
        axis.set(title=f"{name}, successful replies", xlabel=_load(results), ylabel="milliseconds")
        _from_zero(axis)
        _level_axis(axis, results)
        axis.legend(fontsize=8)


def _throughput(axes: list[Axes], results: Results) -> None:
    """Whole-service tokens a second with the knee, and what each stream still gets."""
    for endpoint, stages in _by_endpoint(results).items():
        label = endpoint or "all requests"
        totals = _mean_by_level(stages, lambda s: s.total.tokens_per_s)
        each = _mean_by_level(stages, lambda s: s.total.stream_tokens_per_s)
        axes[0].plot(*totals, "o-", color=COLOURS[endpoint], label=label)
        axes[1].plot(*each, "o-", color=COLOURS[endpoint], label=label)
    if results.knee:
        axes[0].axvline(results.knee, color="#444", linestyle=":", label=f"knee: 90% of the best at {results.knee:g}")
    axes[0].set(title="Throughput", xlabel=_load(results), ylabel="tokens per second")
    axes[1].set(title="One stream, median", xlabel=_load(results), ylabel="tokens per second")
    for axis in axes:
        _from_zero(axis)
        _level_axis(axis, results)
        axis.legend(fontsize=8)


def _languages(axes: list[Axes], results: Results) -> None:
    """TTFT, characters and words a second for one reader, by language of the prompt."""
    languages = sorted({language for stage in results.stages for language in stage.languages})
    stages = [stage for stage in results.stages if stage.endpoint in ("", "A")]
    panels = [
        ("TTFT p50", "milliseconds", lambda found: found.ttft_ms.p50 if found.ttft_ms else None),
        ("One reader", "characters per second", lambda found: found.stream_characters_per_s),
        ("One reader", "words per second", lambda found: found.stream_words_per_s),
    ]
    for axis, (title, unit, value) in zip(axes, panels, strict=True):
        for language in languages:
            points = _mean_by_level(stages, _of_language(language, value))
            axis.plot(*points, "o-", color=COLOURS[language], label=NAMES[language])
        axis.set(title=title, xlabel=_load(results), ylabel=unit)
        _from_zero(axis)
        _level_axis(axis, results)
        axis.legend(fontsize=8)


def _comparison(axes: list[Axes], results: Results) -> None:
    """The three comparisons with their intervals; the dotted line is no difference."""
    panels = [
        ("Throughput", "A / B", "throughput_ratio", 1.0),
        ("Median TTFT", "A - B, milliseconds", "ttft_added_ms", 0.0),
        ("Median TPOT", "A / B", "tpot_ratio", 1.0),
    ]
    levels = [found.level for found in results.comparisons]
    for axis, (title, unit, field, same) in zip(axes, panels, strict=True):
        found = [getattr(comparison, field) for comparison in results.comparisons]
        low, high = [f.value - f.low for f in found], [f.high - f.value for f in found]
        axis.errorbar(levels, [f.value for f in found], [low, high], fmt="o", capsize=4, color=COLOURS["A"])
        axis.axhline(same, color="#444", linestyle=":")
        axis.set(title=f"{title}, 95% interval", xlabel=_load(results), ylabel=unit)
        _level_axis(axis, results)


def _percentile(field: str, share: str) -> Value:
    def value(stage: StageSummary) -> float | None:
        found = getattr(stage.total, field)
        return getattr(found, share) if found else None

    return value


def _of_language(language: str, value: Callable[[Group], float | None]) -> Value:
    def found(stage: StageSummary) -> float | None:
        return value(stage.languages[language]) if language in stage.languages else None

    return found


def _by_endpoint(results: Results) -> dict[str, list[StageSummary]]:
    names = sorted({stage.endpoint for stage in results.stages})
    return {name: [stage for stage in results.stages if stage.endpoint == name] for name in names}


def _mean_by_level(stages: list[StageSummary], value: Value) -> tuple[list[float], list[float]]:
    """Level and mean value over the stages at that level, where there is one."""
    found: dict[float, list[float]] = {}
    for stage in stages:
        number = value(stage)
        if number is not None:
            found.setdefault(stage.level, []).append(number)
    levels = sorted(found)
    return levels, [sum(found[level]) / len(found[level]) for level in levels]


def _from_zero(axis: Axes) -> None:
    """Start at zero, so that heights compare, with room above the highest point."""
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])


def _load(results: Results) -> str:
    return "requests per second" if results.stages[0].mode == "open" else "concurrent requests"


def _level_axis(axis: Axes, results: Results) -> None:
    """Ticks at the measured levels; logarithmic where they span more than a decade."""
    levels = sorted({stage.level for stage in results.stages})
    if levels[-1] > 10 * levels[0]:
        axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [f"{level:g}" for level in levels], minor=False)
    axis.tick_params(axis="x", which="minor", bottom=False)
