# SPDX-License-Identifier: Apache-2.0
"""m2n-bench: the benchmarks, from the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2n.reference_model.command import Files, outlast_stdout, run_command
from m2n.reference_model.errors import InputError, missing_packages

from . import balance, connect, copies, e2e, growth, paper, perftest, transport
from .links import DEFAULT_LINKS, parse_links
from .report import write_json

PROGRAM = "m2n-bench"
_MODEL_EXTRAS = e2e.PROGRAM_NEEDS

_PINGPONG = """What one more microbatch gains: one attention and one expert process on a core each, with m = 1 to 4
microbatches, while signals are held back so that T_c/T_f is as given. Beside it what the simulator makes of T_a, T_e
and T_c, and what the paper measured. With --links the network is a real one: attention and experts run in a network
namespace each, with TCP over a link of such a rate and delay between them (needs root)."""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    description = "Benchmarks of m2n. Exit status: 0 done, 1 a run failed, 2 bad input."
    parser = argparse.ArgumentParser(prog=PROGRAM, description=description)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    transport.add_parsers(commands)
    for module in (connect, copies, growth, paper, perftest, e2e, balance):
        module.add_parser(commands)
    pingpong = commands.add_parser("pingpong", help="what one more microbatch gains", description=_PINGPONG)
    pingpong.add_argument("--rounds", type=int, default=5, help="each in processes of its own (default 5)")
    pingpong.add_argument("--steps", type=int, default=24, help="tokens of each sequence in a run (default 24)")
    pingpong.add_argument(
        "--sequences", type=int, default=24, help="of a microbatch of fixed size (default 24; more if T_f is too short)"
    )
    pingpong.add_argument("--hidden", type=int, default=512, help="of the model (default 512; a multiple of 16)")
    pingpong.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    network = pingpong.add_mutually_exclusive_group()
    network.add_argument("--ratios", default="0,0.1,0.28,0.38,0.8", metavar="R,...", help="T_c/T_f")
    network.add_argument(
        "--links", nargs="?", const=DEFAULT_LINKS, metavar="RATE:DELAY,...", help=f"one way; alone: {DEFAULT_LINKS}"
    )
    pingpong.add_argument("--least-tf-ms", type=float, default=2.0, metavar="MS", help="T_f at least (default 2)")
    pingpong.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    pingpong.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the gains (needs matplotlib)")
    pingpong.add_argument(
        "--timeline", type=Path, metavar="FILE.png", help="draw a few layers of one run with m = 3 (needs matplotlib)"
    )
    pingpong.add_argument("--trace", type=Path, metavar="FILE", help="write that run for ui.perfetto.dev")
    pingpong.set_defaults(run=_pingpong, needs=_MODEL_EXTRAS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of m2n-bench; returns the exit status."""
    command = " ".join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run_command(PROGRAM, lambda: _run(build_parser().parse_args(argv), command))


def _run(args: argparse.Namespace, command: str) -> int:
    missing = missing_packages(args.needs)
    if missing:
        raise InputError(f"needs {', '.join(missing)}: pip install 'm2n[bench]'")
    from .pool import WorkerFailed
    from .runs import RunFailed

    if any(getattr(args, name, None) for name in ("json", "plot", "timeline", "trace")):
        outlast_stdout()
    try:
        args.run(args, command)
    except (WorkerFailed, RunFailed) as error:
        print(f"{PROGRAM}: a run failed: {error}", file=sys.stderr)
        return 1
    return 0


def _pingpong(args: argparse.Namespace, command: str) -> None:
    from rich.console import Console

    from m2n.reference_model.timeline import check_matplotlib, check_writable, draw_timeline, write_trace

    from . import pingpong
    from .machine import machine
    from .pingpong_report import plot, print_report, report

    options = _pingpong_options(args)
    if args.links is not None:
        _pingpong_links(args, command, options)
        return
    for path in (args.json, args.plot, args.timeline, args.trace):
        if path is not None:
            check_writable(path)
    if args.plot is not None or args.timeline is not None:
        check_matplotlib()
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:
        options, shape, rounds = pingpong.run_rounds(options, status.update)
    about = {"machine": machine(), "command": command, **report(options, shape, rounds)}
    print_report(about, Console(highlight=False, width=None if sys.stdout.isatty() else 132))
    shown = rounds[-1]["runs"][pingpong.FIXED_MICROBATCH, options.ratios[len(options.ratios) // 2], 3]
    files = Files()
    files.write(args.json, lambda: write_json(args.json, about))
    files.write(args.plot, lambda: plot(about, args.plot))
    files.write(args.timeline, lambda: draw_timeline(args.timeline, shown.traces, 3))
    files.write(args.trace, lambda: write_trace(args.trace, shown.traces))
    files.raise_faults()


def _pingpong_links(args: argparse.Namespace, command: str, options: Any) -> None:
    from rich.console import Console

    from m2n.reference_model.timeline import check_writable

    from .machine import machine
    from .pingpong_links import require_links, run_rounds
    from .pingpong_links_report import print_report, report

    links = parse_links(args.links)
    if any((args.plot, args.timeline, args.trace)):
        raise InputError("--links: draws no pictures and writes no trace: leave out --plot, --timeline and --trace")
    if args.json is not None:
        check_writable(args.json)
    require_links()
    with Console(stderr=True, highlight=False).status("starting") as status:
        options, shape, rounds = run_rounds(options, links, status.update)
    about = {"machine": machine(), "command": command, **report(options, shape, rounds)}
    print_report(about, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    if args.json is not None:
        write_json(args.json, about)


def _pingpong_options(args: argparse.Namespace) -> Any:
    from .pingpong import LEAST_STEPS, Options

    try:
        ratios = tuple(float(text) for text in args.ratios.split(","))
    except ValueError:
        raise InputError(f"--ratios: expected numbers with commas between them, got {args.ratios!r}") from None
    cores = sorted(os.sched_getaffinity(0))
    checks = (
        (len(cores) >= 2, f"one attention and one expert rank need a core each; this process may use {len(cores)}"),
        (args.rounds >= 1, f"--rounds: expected at least 1, got {args.rounds}"),
        (args.steps >= LEAST_STEPS, f"--steps: expected at least {LEAST_STEPS}, got {args.steps}"),
        (args.sequences >= 1, f"--sequences: expected at least 1, got {args.sequences}"),
        (args.layers >= 1, f"--layers: expected at least 1, got {args.layers}"),
        (args.hidden >= 16 and args.hidden % 16 == 0, f"--hidden: expected a multiple of 16, got {args.hidden}"),
        (args.least_tf_ms >= 0, f"--least-tf-ms: expected milliseconds, got {args.least_tf_ms}"),
        (all(0 <= ratio <= 10 for ratio in ratios), f"--ratios: expected T_c/T_f from 0 to 10, got {args.ratios!r}"),
    )
    for is_fine, text in checks:
        if not is_fine:
            raise InputError(text)
    return Options(
        cores=(cores[0], cores[1]),
        rounds=args.rounds,
        steps=args.steps,
        sequences=args.sequences,
        ratios=ratios,
        hidden=args.hidden,
        num_layers=args.layers,
        least_t_f_ms=args.least_tf_ms,
    )


if __name__ == "__main__":
    sys.exit(main())
