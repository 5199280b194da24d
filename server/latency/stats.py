"""Percentiles, bootstrap confidence intervals, and the knee of a throughput curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

SEED = 20240220
RESAMPLES = 1000
KNEE_SHARE = 0.9


class Quantiles(BaseModel):
    """A distribution, in the unit of its values; `p50_low` and `p50_high` bound the median with 95% confidence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p50_low: float
    p50_high: float


def quantiles(values: Sequence[float]) -> Quantiles | None:
    """The distribution of `values` (linear interpolation), None of nothing."""
    if not values:
        return None
    data = np.asarray(values, dtype=float)
    p50, p90, p95, p99 = np.percentile(data, [50, 90, 95, 99])
    low, high = bootstrap(data, "median")
    return Quantiles(count=len(data), mean=data.mean(), p50=p50, p90=p90, p95=p95, p99=p99, p50_low=low, p50_high=high)


def bootstrap(values: Sequence[float] | np.ndarray, statistic: str) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the "mean" or "median", with a fixed seed (Efron, Annals of Stat. 1979)."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(SEED).integers(0, len(data), size=(RESAMPLES, len(data)))
    resampled = np.median(data[draws], axis=1) if statistic == "median" else data[draws].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def weighted_quantiles(pairs: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """p50, p90, p95 and p99 of values that count `weight` times each (value, weight); None without any weight."""
    kept = sorted((value, weight) for value, weight in pairs if weight > 0)
    if not kept:
        return None
    values, weights = np.array(kept).T
    reached = np.cumsum(weights) / weights.sum()
    return {f"p{q}": float(values[np.searchsorted(reached, q / 100 - 1e-12)]) for q in (50, 90, 95, 99)}


def knee(levels: Sequence[float], throughput: Sequence[float]) -> float | None:
    """The lowest level that reaches 90% of the best throughput: more load than this mostly adds waiting."""
    best = max(throughput, default=0.0)
    reached = [level for level, rate in sorted(zip(levels, throughput, strict=True)) if rate >= KNEE_SHARE * best]
    return reached[0] if best > 0 else None
