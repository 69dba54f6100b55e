# SPDX-License-Identifier: Apache-2.0
"""m2n-bench latency, sweep, grid and roundtrip: dispatch and combine against limits and peers, in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2n.reference_model.command import Files
from m2n.reference_model.errors import InputError
from m2n.reference_model.timeline import check_matplotlib, check_writable

from . import report, runs
from .cases import DTYPE_BYTES, Case, make_case, require_memory
from .routing import ROUTINGS

LIMITS = "memcpy,non-temporal,hop"
_SWEEP = ",".join(str(1024 << i) for i in range(14))

_COMMANDS = {  # what it measures, and the default sizes
    "latency": ("one way and round trip of dispatch and combine", "1024,262144"),
    "sweep": ("the same from 1 KB to 8 MB per pair", _SWEEP),
    "grid": ("the same for M x N ranks", "262144"),
    "roundtrip": ("dispatch, an expert that does nothing, combine: what an engine sees", "262144"),
}


def add_parsers(commands: Any) -> None:
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


def add_options(parser: argparse.ArgumentParser, sizes: str) -> None:
    """What all transport benchmarks take."""
    add = parser.add_argument
    add("--sizes", default=sizes, metavar="BYTES,...", help="per pair of ranks (default %(default)s)")
    known = ",".join(runs.known_contenders())
    add("--baselines", default=LIMITS, metavar="NAME,...", help=f"of {known} (default %(default)s; '' for none)")
    add("--python", action="store_true", help="m2n at the Python boundary too, as with any contender there")
    add("--hidden", type=int, metavar="H", help="elements of a row (default: rows of at most 8 KB)")
    add("--dtype", choices=sorted(DTYPE_BYTES), default="bfloat16", help="of rows, both ways (default bfloat16)")
    add("--top-k", type=int, default=2, metavar="K", help="experts of a token (default 2)")
    add("--experts", type=int, metavar="E", help="default: at least 8, as many on each rank")
    add("--reduce-at", choices=("expert", "attention"), default="expert", help="where sums are made (default expert)")
    add("--routing", default="balanced", metavar="HOW", help=f"{', '.join(ROUTINGS)}, or a file of --record-routes")
    add("--transport", default="shm", choices=("shm", "tcp", "ucx"), help="of m2n (default shm), by loopback")
    add(
        "--pin",
        default="auto",
        metavar="auto|none|C,...",
        help="cores by process, attention ranks first (default auto)",
    )
    add("--starts", type=int, default=8, metavar="N", help="process starts per case (default 8)")
    add("--seconds", type=float, default=0.3, metavar="S", help="of each contender in a start (default 0.3)")
    add_outputs(parser)
    add("--plot", type=Path, metavar="FILE.png", help="draw p50 and p99 against bytes (needs matplotlib)")
    add("--compare", type=Path, metavar="OLD.json", help="against the results of an earlier run")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")


def parse_list(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        InputError: naming the option.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected whole numbers with commas between them, got {text!r}") from None


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
    """Measures, prints, writes."""
    old = prepare(args)
    is_grid = args.benchmark == "grid"
    ranks = parse_ranks(args.ranks) if is_grid else [(args.attention_ranks, args.expert_ranks)]
    cases = [make_case(m, n, size, args) for m, n in ranks for size in parse_list("--sizes", args.sizes)]
    plan = runs.make_plan([name for name in args.baselines.split(",") if name], args.starts, args.seconds, args.python)
    rows = measure_all(cases, plan)
    directions = ("roundtrip",) if args.benchmark == "roundtrip" else runs.DIRECTIONS
    finish(args, command, rows, old, directions)


def prepare(args: argparse.Namespace) -> list[report.Row]:
    """Checks all files before anything is started; the rows to compare with."""
    for path in (args.json, args.plot):
        if path is not None:
            check_writable(path)
    if args.plot is not None:
        check_matplotlib()
    return [] if args.compare is None else report.read_rows(args.compare)


def measure_all(cases: Sequence[Case], plan: runs.Plan) -> list[report.Row]:
    """The rows of all cases, with a progress bar where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    runs.program()
    for case in cases:
        require_memory(case, len(plan.native) + len(plan.python))
    rows = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(cases) * plan.starts)
        for case in cases:
            progress.update(task, description=f"{case.m} x {case.n}, {report.size_name(case.num_bytes)}")
            rows += runs.measure(case, plan, lambda: progress.advance(task))
    return rows


def finish(
    args: argparse.Namespace, command: str, rows: list[report.Row], old: list[report.Row], directions: Sequence[str]
) -> None:
    """Prints the tables and writes what was asked for."""
    from rich.console import Console

    from .machine import machine

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    report.print_rows(rows, console, directions)
    compared = report.compare(old, rows)
    if compared:
        report.print_comparison(compared, console)
    options = {name: str(value) for name, value in vars(args).items() if name not in ("run", "needs", "benchmark")}
    about = {"machine": machine(), "command": command, "options": options, "rows": rows}
    files = Files()
    files.write(args.json, lambda: report.write_json(args.json, about | ({"compared": compared} if compared else {})))
    files.write(args.plot, lambda: report.plot(rows, args.plot))
    files.raise_faults()
