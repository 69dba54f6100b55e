# SPDX-License-Identifier: Apache-2.0
"""m2n-bench paper: figures 5, 11 and 12 of MegaScale-Infer, on the cores of one machine.

The paper compares its library with NCCL between GPUs of several hosts; here every rank is a process, and the contenders
are what such processes can use. What carries over is the shape of the figures: how latency and its tail grow with the
number of peers and with size, and by how much a library for this job beats general ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from m2n.reference_model.console.tables import print_table

from ..harness import report, runs
from ..harness.cases import Case, make_case
from ..harness.options import add_outputs

KB, MB = 1 << 10, 1 << 20
_NATIVE = "memcpy,non-temporal,hop,ucx-shm,mpi"
_PYTHON = ("gloo",)
# Against NCCL: the paper's section 7.3, and the text on figures 11 and 12.
PAPER = {
    "figure 5": "medians and p99 that grow with N (motivation only, no figures in the text)",
    "figure 11": "at 256 KB median 3.1x and p99 14x lower, throughput 4.2x; at the best size 5.2x, 26x, 9.9x",
    "figure 12": "p99 2.2x to 32x lower, throughput 3.3x to 5.8x",
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """Cases (M, N, bytes per pair) that belong together."""

    name: str
    text: str
    cases: tuple[tuple[int, int, int], ...]
    starts: int
    # As Qwen3-MoE. m2n's windows hold every token on every link: with 2, those of 32 x 32 ranks take 16 GB.
    top_k: int = 8


_FIGURE_11 = tuple((8, 8, size) for size in (KB, 8 * KB, 64 * KB, 256 * KB, MB, 8 * MB))
_FIGURE_12 = tuple((m, n, 256 * KB) for m, n in ((4, 4), (8, 8), (16, 16), (32, 32), (4, 8), (8, 4), (4, 16), (16, 4)))
FIGURES = (
    Figure("pinned", "a core for each rank: the limit can be seen", tuple((1, 1, KB << i) for i in range(14)), 8, 2),
    Figure(
        "1 to 2 and 2 to 1",
        "where three ranks have a core each, else shared",
        ((1, 2, 256 * KB), (2, 1, 256 * KB)),
        4,
        2,
    ),
    Figure("figure 5", "one to N, 128 KB", tuple((1, n, 128 * KB) for n in (8, 16, 32)), 3),
    Figure("figure 11", "8 x 8", _FIGURE_11, 2),
    Figure("figure 12", "256 KB", _FIGURE_12, 2),
)
_QUICK = (
    Figure("pinned", "a core for each rank: the limit can be seen", ((1, 1, KB), (1, 1, 8 * KB)), 1),
    Figure("figure 5", "one to N", ((1, 3, KB),), 1),
    Figure("figure 11", "2 x 2", ((2, 2, KB),), 1),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("paper", help="figures 5, 11 and 12 of MegaScale-Infer", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=0.3, metavar="S", help="of each contender in a start (default 0.3)"
    )
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that everything runs")
    add_outputs(parser)
    parser.set_defaults(
        run=run, needs=("rich", "numpy"), plot=None, compare=None, hidden=None, dtype="bfloat16", experts=None,
        reduce_at="expert", routing="balanced", transport="shm", pin="auto",
    )  # fmt: skip


def run(args: argparse.Namespace, command: str) -> None:
    """Measures all figures, prints them beside the paper's, writes the JSON."""
    figures = _QUICK if args.quick else FIGURES
    of_figures = [(figure, _case(figure, numbers, args)) for figure in figures for numbers in figure.cases]
    work = [(f"{figure.name}: ", case, _plan(case, figure.starts, args.seconds)) for figure, case in of_figures]
    measured = zip(of_figures, runs.measure_all(work))
    rows = [{"figure": figure.name, **row} for (figure, _), found in measured for row in found]
    comparison = compare_contenders(rows)
    console = report.results_console(140)
    for figure in figures:
        _print_figure(figure, [row for row in comparison if row["figure"] == figure.name], console)
    report.save_json(args.json, command, paper=PAPER, comparison=comparison, rows=rows)


def _case(figure: Figure, numbers: tuple[int, int, int], args: argparse.Namespace) -> Case:
    return make_case(*numbers, argparse.Namespace(**vars(args), top_k=figure.top_k))


def _plan(case: Case, starts: int, seconds: float) -> runs.Plan:
    """Where the scheduler shares the cores among ranks, a hop and stores past the caches say nothing."""
    baselines = _NATIVE.split(",")
    if not case.cores:
        baselines.remove("hop")
        baselines.remove("non-temporal")
    return runs.make_plan([*baselines, *_PYTHON], starts, seconds)


def compare_contenders(rows: Sequence[report.Row]) -> list[report.Row]:
    """One row for each case and contender: how many times its median and p99 are those of m2n at the same boundary,
    and how many times its throughput m2n has, for dispatch one way and for the round trip."""
    compared = []
    ours = {_place(row): row for row in rows if row["contender"] == "m2n" and "p50_us" in row}
    for row in rows:
        if row["contender"] == "m2n" or row["direction"] == "combine":
            continue
        about = {
            name: row[name] for name in ("figure", "contender", "boundary", "direction", "m", "n", "bytes", "placement")
        }
        if "reason" in row:
            compared.append({**about, "reason": row["reason"]})
            continue
        mine = ours[_place(row)]
        figures = {
            "m2n_p50_us": mine["p50_us"],
            "m2n_p99_us": mine["p99_us"],
            "p50_us": row["p50_us"],
            "p99_us": row["p99_us"],
            "p50_ratio": row["p50_over_m2n"],
            "p99_ratio": row["p99_over_m2n"],
            "throughput_ratio": round(mine["throughput_gb_s"] / row["throughput_gb_s"], 3),
        }
        compared.append({**about, **figures})
    return compared


def _place(row: report.Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("figure", "boundary", "direction", "m", "n", "bytes"))


def _print_figure(figure: Figure, compared: Sequence[report.Row], console: Any) -> None:
    from rich.table import Table

    paper = PAPER.get(figure.name, "")
    title = f"{figure.name}: {figure.text}" + (f"; the paper against NCCL: {paper}" if paper else "")
    table = Table("m x n", "size", "cores", "contender", "boundary", "direction", "m2n p50 us (p99)", "its p50 (p99)",
                  "p50 / m2n's", "p99 / m2n's", "m2n's GB/s / its", title=title, title_justify="left")  # fmt: skip
    for row in compared:
        size, names = report.size_name(row["bytes"]), ("placement", "contender", "boundary")
        where = [f"{row['m']} x {row['n']}", size, *(row[name] for name in names)]
        if "reason" in row:
            table.add_row(*where, f"not run: {row['reason']}")
            continue
        table.add_row(
            *where, row["direction"], f"{row['m2n_p50_us']:,.2f} ({row['m2n_p99_us']:,.2f})",
            f"{row['p50_us']:,.2f} ({row['p99_us']:,.2f})", f"{row['p50_ratio']:.2f}", f"{row['p99_ratio']:.2f}",
            f"{row['throughput_ratio']:.2f}",
        )  # fmt: skip
    print_table(console, table)
