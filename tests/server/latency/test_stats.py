from __future__ import annotations

import random

import pytest

from server.latency.stats import bootstrap, knee, quantiles, weighted_quantiles


def test_percentiles_interpolate() -> None:
    found = quantiles([float(value) for value in range(1, 101)])
    assert found
    assert (found.count, found.mean, found.p50) == (100, 50.5, 50.5)
    assert (found.p90, found.p95, found.p99) == pytest.approx((90.1, 95.05, 99.01))
    assert found.p50_low < 50.5 < found.p50_high


def test_nothing_has_no_percentiles() -> None:
    assert quantiles([]) is None
    assert weighted_quantiles([(1.0, 0.0)]) is None


def test_intervals_repeat_and_shrink_with_the_square_root() -> None:
    rng = random.Random(1)
    few, many = ([rng.gauss(10, 2) for _ in range(size)] for size in (25, 2500))
    assert bootstrap(few, "mean") == bootstrap(few, "mean")
    low, high = bootstrap(many, "mean")
    assert high - low == pytest.approx(2 * 1.96 * 2 / 50, rel=0.15)
    assert bootstrap([3.0] * 9, "median") == (3.0, 3.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = random.Random(2)
    intervals = [bootstrap([rng.gauss(0, 1) for _ in range(20)], "mean") for _ in range(200)]
    assert 0.86 <= sum(low <= 0 <= high for low, high in intervals) / 200 <= 0.99


def test_weights_count_as_repetitions() -> None:
    pairs = [(5.0, 1.0), (1.0, 97.0), (9.0, 2.0)]
    assert weighted_quantiles(pairs) == {"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 9.0}


@pytest.mark.parametrize(
    ("levels", "rates", "found"),
    [
        ([1, 2, 4, 8, 16], [10, 19, 36, 40, 39], 4),
        ([16, 1, 4], [40, 10, 39], 4),
        ([1, 2], [0, 0], None),
        ([], [], None),
    ],
)
def test_the_knee_is_the_lowest_level_with_90_percent(levels: list[int], rates: list[int], found: int | None) -> None:
    assert knee([float(level) for level in levels], [float(rate) for rate in rates]) == found
