# SPDX-License-Identifier: Apache-2.0
"""What the transport benchmarks make of samples, on samples whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from m2n.benchmarks.harness import report, stats
from m2n.benchmarks.harness.routing import make_topk


def test_the_first_tenth_warms_up() -> None:
    samples = np.array([900.0] * 10 + [5.0] * 90)
    assert len(stats.without_warm_up(samples)) == 90
    assert stats.of_start([samples])["max_us"] == 5.0
    assert len(stats.without_warm_up(np.array([900.0, 1.0, 2.0]))) == 2  # the first of all goes in any case
    assert len(stats.without_warm_up(np.array([1.0]))) == 1  # but never everything


def test_quantiles_of_a_start_are_those_of_all_its_processes() -> None:
    start = stats.of_start([np.array([0.0, *range(1, 51)]), np.array([0.0, *range(51, 101)])])
    without = [*range(5, 51), *range(55, 101)]  # a tenth of 51 samples each goes: five
    assert start["samples"] == len(without)
    for name, share in (("p50_us", 50), ("p90_us", 90), ("p99_us", 99)):
        assert start[name] == pytest.approx(np.percentile(without, share))
    assert start["mean_us"] == pytest.approx(np.mean(without))


def start_of(p50: float, p99: float, mean: float) -> dict[str, float]:
    return {"p50_us": p50, "p90_us": p99, "p99_us": p99, "p999_us": p99, "max_us": p99, "mean_us": mean, "samples": 10}


def test_starts_give_medians_and_the_spread() -> None:
    row = stats.of_starts([start_of(10, 20, 10), start_of(70, 90, 40), start_of(12, 30, 20)], 200_000)
    assert (row["p50_us"], row["p99_us"], row["p50_min_us"], row["p50_max_us"], row["max_us"]) == (12, 30, 10, 70, 90)
    assert row["throughput_gb_s"] == 10.0  # 200 KB in 20 us
    assert (row["starts"], row["samples"]) == (3, 30)


def test_a_ratio_is_that_of_each_start() -> None:
    """The machine was three times as slow in one start: both contenders met that, and the ratio does not see it."""
    ours = [start_of(10, 1, 1), start_of(30, 1, 1), start_of(10, 1, 1)]
    theirs = [start_of(20, 1, 1), start_of(60, 1, 1), start_of(25, 1, 1)]
    assert stats.ratio(ours, theirs, "p50_us") == 2.0


def row_of(contender: str, p50: float, **more: Any) -> dict[str, Any]:
    case = {"boundary": "cpp", "direction": "dispatch", "m": 1, "n": 1, "bytes": 1024, "row_bytes": 1024}
    case |= {"dtype": "bfloat16", "top_k": 2, "reduce_at": "expert", "routing": "balanced"}
    return {"contender": contender, **case, "p50_us": p50, "p99_us": 2 * p50, **more}


def test_compare_matches_rows_and_shows_the_machines_own_change() -> None:
    old = [row_of("m2n", 2.0), row_of("memcpy", 1.0), row_of("mpi", 3.0), row_of("m2n", 9.0, bytes=4096)]
    new = [row_of("m2n", 3.0), row_of("memcpy", 1.5), {**row_of("mpi", 1.0), "reason": "gone"}]
    del new[2]["p50_us"]
    compared = report.compare(old, new)
    assert [row["contender"] for row in compared] == ["m2n", "memcpy"]
    assert (compared[0]["p50_ratio"], compared[0]["limit_ratio"]) == (1.5, 1.5)


@pytest.mark.parametrize(("n", "rows", "experts", "top_k"), [(1, 5, 8, 2), (3, 4, 9, 2), (8, 3, 8, 1), (2, 7, 8, 6)])
def test_balanced_routes_give_every_rank_the_same(n: int, rows: int, experts: int, top_k: int) -> None:
    ids = make_topk("balanced", 2, n, rows, experts, top_k)
    ranks = np.where(ids < 0, -1, ids // (experts // n))
    for rank in range(n):
        assert ((ranks == rank).any(-1).sum(-1) == rows).all()
    for token in ids.reshape(-1, top_k):
        used = token[token >= 0]
        assert len(set(used)) == len(used) and (used < experts).all()


def test_zipf_and_hot_routes_are_skewed() -> None:
    zipf, hot = (make_topk(routing, 1, 4, 200, 16, 2)[0] for routing in ("zipf", "hot"))
    assert (hot[:, 0] == 0).all()
    counts = np.bincount(zipf.ravel(), minlength=16)
    assert counts[0] > 3 * counts[8:].mean()
