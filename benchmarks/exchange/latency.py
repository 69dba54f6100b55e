# SPDX-License-Identifier: Apache-2.0
"""m2n-bench latency, sweep, grid and roundtrip: dispatch and combine against limits and peers, in one run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from m2n.reference_model.console.files import Files
from m2n.reference_model.errors import InputError

from ..harness import report, runs
from ..harness.cases import make_case
from ..harness.options import add_options, parse_list

_SWEEP = ",".join(str(1024 << i) for i in range(14))

_COMMANDS = {  # what it measures, and the default sizes
    "latency": ("one way and round trip of dispatch and combine", "1024,262144"),
    "sweep": ("the same from 1 KB to 8 MB per pair", _SWEEP),
    "grid": ("the same for M x N ranks", "262144"),
    "roundtrip": ("dispatch, an expert that does nothing, combine: what an engine sees", "262144"),
}


def add_parser(commands: Any) -> None:
    """The four commands."""
    for name, (text, sizes) in _COMMANDS.items():
        parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {_BOUNDARY}")
        add_options(parser, sizes)
        if name == "grid":
            parser.add_argument(
                "--ranks", default="1x1,1x2,2x1,2x2,4x4,8x8", metavar="MxN,...", help="default %(default)s"
            )
        else:
            parser.add_argument("--attention-ranks", type=int, default=1, metavar="M", help="default 1")
            parser.add_argument("--expert-ranks", type=int, default=1, metavar="N", help="default 1")
        parser.set_defaults(run=run, needs=("rich", "numpy"))


_BOUNDARY = """One boundary of time for all contenders: from before the call that sends, with x in memory, until the
receiver has read every line of the rows (dispatch), or has their sum in y (combine)."""


def parse_ranks(text: str) -> list[tuple[int, int]]:
    """As in "1x2,8x8".

    Raises:
        InputError: naming the option.
    """
    try:
        pairs = [tuple(int(number) for number in word.split("x")) for word in text.split(",")]
        return [(m, n) for m, n in pairs]
    except ValueError:
        raise InputError(f"--ranks: expected pairs as 1x2,8x8, got {text!r}") from None


def run(args: argparse.Namespace, command: str) -> None:
    old = [] if args.compare is None else report.read_rows(args.compare)
    is_grid = args.benchmark == "grid"
    ranks = parse_ranks(args.ranks) if is_grid else [(args.attention_ranks, args.expert_ranks)]
    cases = [make_case(m, n, size, args) for m, n in ranks for size in parse_list("--sizes", args.sizes)]
    plan = runs.make_plan([name for name in args.baselines.split(",") if name], args.starts, args.seconds, args.python)
    rows = list(itertools.chain(*runs.measure_all([("", case, plan) for case in cases])))
    directions = ("roundtrip",) if args.benchmark == "roundtrip" else runs.DIRECTIONS
    finish(args, command, rows, old, directions)


def finish(
    args: argparse.Namespace, command: str, rows: list[report.Row], old: list[report.Row], directions: Sequence[str]
) -> None:
    """Prints the tables and writes what was asked for."""
    console = report.results_console(180)
    report.print_rows(rows, console, directions)
    compared = report.compare(old, rows)
    if compared:
        report.print_comparison(compared, console)
    options = {name: str(value) for name, value in vars(args).items() if name not in ("run", "needs", "benchmark")}
    more = {"compared": compared} if compared else {}
    files = Files()
    files.write(args.json, lambda: report.save_json(args.json, command, options=options, rows=rows, **more))
    files.write(args.plot, lambda: report.plot(rows, args.plot))
    files.raise_faults()
