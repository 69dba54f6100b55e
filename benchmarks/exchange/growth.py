# SPDX-License-Identifier: Apache-2.0
"""m2n-bench growth: what one more expert rank, one more row and one more idle link cost, at a fixed number of bytes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2n.reference_model.console.children import python_command
from m2n.reference_model.console.tables import print_table
from m2n.reference_model.errors import InputError

from ..harness import runs, stats
from ..harness.cases import SHARED_FOLDER, Case, require_memory
from ..harness.options import add_outputs, parse_list
from ..harness.report import Row, results_console, save_json, size_name

# What grows: (the unit of a slope, how many of it are in one us).
_UNITS = {
    "expert ranks": ("us per expert rank", 1.0),
    "expert ranks, one thread": ("us per expert rank", 1.0),
    "rows": ("ns per row", 1e3),
    "idle links": ("ns per idle link", 1e3),
}
_COLUMNS = ("dispatch_send", "combine_recv", "roundtrip")  # of growth_ranks
_ROUNDS = 400
_MAX_IDLE = 63  # max_peers is 64
_ROW_BYTES = 2048
_TIMEOUT_S = 60.0

_ABOUT = """What one more of something costs while the bytes stay the same; slopes by least squares over p50. "expert
ranks": a process each, at the C++ boundary, not pinned: beyond the cores it is mostly the scheduler's cost, which the
slope of memcpy shows alone. "expert ranks, one thread": the time of the attention rank's own verbs, with all expert
ranks in one thread on another core, at the Python boundary. "rows": the same bytes in more and shorter rows, pinned,
at the C++ boundary. "idle links": attention ranks that have joined and send nothing, beside one that sends one row, at
the Python boundary."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("growth", help="what one more rank, row or idle link costs", description=_ABOUT)
    add = parser.add_argument
    add("--bytes", type=int, default=65536, help="of all rows of a dispatch (default %(default)s)")
    add("--expert-ranks", default="1,2,4,8,16", metavar="N,...", help="default %(default)s")
    add("--row-bytes", default="8192,4096,2048,1024,512,256", metavar="BYTES,...", help="default %(default)s")
    add("--idle", default="0,4,8,16,32,63", metavar="LINKS,...", help="default %(default)s")
    add("--starts", type=int, default=6, metavar="N", help="process starts per point (default 6)")
    add("--seconds", type=float, default=0.2, metavar="S", help="of each contender in a start (default 0.2)")
    add_outputs(parser)
    parser.set_defaults(run=run, needs=("rich", "numpy"))


def run(args: argparse.Namespace, command: str) -> None:
    """Measures, prints, writes.

    Raises:
        InputError: naming the option. RunFailed: a rank failed.
    """
    from rich.console import Console

    ranks, row_bytes, idle = _points(args)
    plan = runs.make_plan(["memcpy"], args.starts, args.seconds)
    runs.program()
    cores = _two_cores()
    status = Console(stderr=True).status("")
    with status:
        rows = _native(args.bytes, ranks, row_bytes, cores, plan, status.update)
        for n in ranks:
            status.update(f"{n} expert ranks in one thread")
            rows += measure_python("expert ranks, one thread", n, args.bytes, [0], cores, args.starts)
        status.update("idle links")
        rows += measure_python("idle links", 1, _ROW_BYTES, idle, cores, args.starts)
    slopes = fit_all(rows)
    print_all(rows, slopes, results_console(140))
    save_json(args.json, command, rows=rows, slopes=slopes)


def _points(args: argparse.Namespace) -> tuple[list[int], list[int], list[int]]:
    ranks, row_bytes, idle = (
        sorted(set(parse_list(option, text)))
        for option, text in (
            ("--expert-ranks", args.expert_ranks),
            ("--row-bytes", args.row_bytes),
            ("--idle", args.idle),
        )
    )
    for name, points in (("--expert-ranks", ranks), ("--row-bytes", row_bytes), ("--idle", idle)):
        if len(points) < 2:
            raise InputError(f"{name}: a slope needs at least 2 different numbers, got {len(points)}")
    for n in ranks:
        if n < 1 or n > 64 or args.bytes < 1 or args.bytes % (n * _ROW_BYTES):
            raise InputError(
                f"--expert-ranks: {args.bytes} bytes do not spread over {n} ranks in whole rows of {_ROW_BYTES} bytes"
            )
    for size in row_bytes:
        if size < 2 or size % 2 or args.bytes % size:
            raise InputError(f"--row-bytes: {args.bytes} bytes are no whole rows of {size} bytes (bfloat16)")
    if idle[0] < 0 or idle[-1] > _MAX_IDLE:
        raise InputError(f"--idle: expected 0 to {_MAX_IDLE} links, got {idle[0]} to {idle[-1]}")
    return ranks, row_bytes, idle


def _two_cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise InputError(f"an attention and an expert rank need a core each; this process may use {len(cores)}")
    return cores[0], cores[1]


def _native(
    num_bytes: int, ranks: Sequence[int], row_bytes: Sequence[int], cores: tuple[int, int], plan: runs.Plan,
    tell: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Both series at the C++ boundary; one expert per token."""
    points = [("expert ranks", n, Case(1, n, num_bytes // n, _ROW_BYTES, num_experts=n, top_k=1)) for n in ranks]
    for size in row_bytes:
        points.append(("rows", num_bytes // size, Case(1, 1, num_bytes, size, num_experts=1, top_k=1, cores=cores)))
    for _, _, case in points:
        require_memory(case, len(plan.native))
    rows = []
    for series, x, case in points:
        tell(f"{x} {series}")
        rows += [{"series": series, "x": x, **row} for row in runs.measure(case, plan, lambda: None)]
    return rows


def measure_python(
    series: str, n: int, num_bytes: int, idle_counts: Sequence[int], cores: tuple[int, int], starts: int
) -> list[Row]:
    """Rows for growth_ranks with `n` expert ranks: one for each of its columns and of `idle_counts`.

    Args:
        num_bytes: of all rows of a dispatch.
        idle_counts: of attention ranks beside the one that sends; ascending.
        starts: of the processes.

    Raises:
        RunFailed: a rank failed.
    """
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(starts):
        with tempfile.TemporaryDirectory(prefix="m2n-", dir=SHARED_FOLDER) as name:
            about = {
                "n": n, "tokens": num_bytes // _ROW_BYTES, "row_bytes": _ROW_BYTES, "rounds": _ROUNDS,
                "idle_counts": list(idle_counts), "cores": cores,
            }  # fmt: skip
            (Path(name) / "case.json").write_text(json.dumps(about), encoding="utf-8")
            rank = python_command("m2n.benchmarks.exchange.growth_ranks", name)
            runs.run_processes([[*rank, "attention"], [*rank, "expert"]], _TIMEOUT_S)
            for idle in idle_counts:
                for column, samples in zip(_COLUMNS, np.load(Path(name) / f"{idle}.npy").T):
                    found.setdefault((idle, column), []).append(stats.of_start([samples]))
    rows = []
    for (idle, column), values in found.items():
        case = {"m": 1 + idle, "n": n, "bytes": num_bytes // n, "row_bytes": _ROW_BYTES, "placement": "pinned"}
        x = idle if series == "idle links" else n
        row = {"series": series, "x": x, "contender": "m2n", "direction": column, "boundary": "python", **case}
        rows.append({**row, **stats.of_starts(values, num_bytes * (2 if column == "roundtrip" else 1))})
    return rows


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """The straight line through points by least squares: (slope, value at 0, the share of variance it explains).

    Raises:
        ValueError: fewer than two different xs.
    """
    if len(set(xs)) < 2:
        raise ValueError("xs: a line needs at least two different ones")
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)
    at_zero = mean_y - slope * mean_x
    total = sum((y - mean_y) ** 2 for y in ys)
    left = sum((y - at_zero - slope * x) ** 2 for x, y in zip(xs, ys))
    return slope, at_zero, 1.0 - left / total if total else 1.0


def fit_all(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One slope of p50 for each series, contender and direction, with its unit."""
    slopes = []
    for key in dict.fromkeys((row["series"], row["contender"], row["direction"]) for row in rows if "p50_us" in row):
        points = [row for row in rows if (row["series"], row["contender"], row["direction"]) == key]
        slope, at_zero, share = fit([row["x"] for row in points], [row["p50_us"] for row in points])
        unit, per_us = _UNITS[key[0]]
        slopes.append({
            "series": key[0], "contender": key[1], "direction": key[2], "slope": round(slope * per_us, 3), "unit": unit,
            "at_zero_us": round(at_zero, 3), "r2": round(share, 3), "points": len(points),
        })  # fmt: skip
    return slopes


def print_all(rows: Sequence[Row], slopes: Sequence[dict[str, Any]], console: Any) -> None:
    """A table for each series: p50 at every point, and the slope."""
    from rich.table import Table

    for series in _UNITS:
        mine = [row for row in rows if row["series"] == series]
        xs = sorted({row["x"] for row in mine})
        total = size_name(mine[0]["bytes"] * mine[0]["n"])
        table = Table("contender", "direction", title=f"p50 us against {series}, {total} in all", title_justify="left")
        for column in [*(f"{x}" for x in xs), "slope", "at 0, us", "r2"]:
            table.add_column(column, justify="right")
        for line in (slope for slope in slopes if slope["series"] == series):
            key = line["contender"], line["direction"]
            p50 = {row["x"]: row["p50_us"] for row in mine if (row["contender"], row["direction"]) == key}
            figures = [f"{p50[x]:,.2f}" for x in xs]
            slope = f"{line['slope']:,.2f} {line['unit']}"
            table.add_row(*key, *figures, slope, f"{line['at_zero_us']:,.2f}", f"{line['r2']:.2f}")
        print_table(console, table)
