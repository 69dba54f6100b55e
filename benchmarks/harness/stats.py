# SPDX-License-Identifier: Apache-2.0
"""Statistics of samples from several process starts: what a start gives, and what all of them give together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

QUANTILES = {"p50_us": 50.0, "p90_us": 90.0, "p99_us": 99.0, "p999_us": 99.9}
_WARM_UP = 0.1  # of the samples of each process


def without_warm_up(samples: np.ndarray) -> np.ndarray:
    """The samples of one process behind its first tenth, and behind the first of all."""
    return samples[max(1, int(len(samples) * _WARM_UP)) :] if len(samples) > 1 else samples


def of_start(processes: Sequence[np.ndarray]) -> dict[str, float]:
    """Of one process start: quantiles, maximum and mean (us) of the samples of all its processes."""
    samples = np.concatenate([without_warm_up(part) for part in processes])
    values = {name: float(np.percentile(samples, share)) for name, share in QUANTILES.items()}
    return {**values, "max_us": float(samples.max()), "mean_us": float(samples.mean()), "samples": len(samples)}


def of_starts(starts: Sequence[Mapping[str, float]], payload_bytes: int) -> dict[str, Any]:
    """Medians over the starts; the lowest and highest p50 of a start; all samples.

    `throughput_gb_s` is the payload of one direction and all pairs over the mean time, so that slow exchanges count.
    """
    row: dict[str, Any] = {name: statistics.median(start[name] for start in starts) for name in (*QUANTILES, "mean_us")}
    row["max_us"] = max(start["max_us"] for start in starts)
    row["p50_min_us"] = min(start["p50_us"] for start in starts)
    row["p50_max_us"] = max(start["p50_us"] for start in starts)
    row = {name: round(value, 3) for name, value in row.items()}
    row["throughput_gb_s"] = round(payload_bytes / (row["mean_us"] * 1e3), 3) if row["mean_us"] else 0.0
    row["starts"] = len(starts)
    row["samples"] = sum(int(start["samples"]) for start in starts)
    return row


def ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], name: str) -> float:
    """theirs / ours: the median over starts of each start's own ratio, so that both ends met the same moments."""
    return round(statistics.median(b[name] / a[name] for a, b in zip(ours, theirs)), 3)
