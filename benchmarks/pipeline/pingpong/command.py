# SPDX-License-Identifier: Apache-2.0
"""m2n-bench pingpong: its options, and what becomes of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from m2n.reference_model.console.files import Files
from m2n.reference_model.errors import InputError

from ...harness.links import DEFAULT_LINKS, parse_links
from ...harness.report import results_console, save_json
from .. import PROGRAM_NEEDS

_ABOUT = """What one more microbatch gains: one attention and one expert process on a core each, with m = 1 to 4
microbatches, while signals are held back so that T_c/T_f is as given. Beside it what the simulator makes of T_a, T_e
and T_c, and what the paper measured. With --links the network is a real one: attention and experts run in a network
namespace each, with TCP over a link of such a rate and delay between them (needs root)."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("pingpong", help="what one more microbatch gains", description=_ABOUT)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="each in processes of its own (default 5)")
    add("--steps", type=int, default=24, help="tokens of each sequence in a run (default 24)")
    add(
        "--sequences", type=int, default=24, help="of a microbatch of fixed size (default 24; more if T_f is too short)"
    )
    add("--hidden", type=int, default=512, help="of the model (default 512; a multiple of 16)")
    add("--layers", type=int, default=4, help="of the model (default 4)")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--ratios", default="0,0.1,0.28,0.38,0.8", metavar="R,...", help="T_c/T_f")
    network.add_argument(
        "--links", nargs="?", const=DEFAULT_LINKS, metavar="RATE:DELAY,...", help=f"one way; alone: {DEFAULT_LINKS}"
    )
    add("--least-tf-ms", type=float, default=2.0, metavar="MS", help="T_f at least (default 2)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--plot", type=Path, metavar="FILE.png", help="draw the gains (needs matplotlib)")
    add("--timeline", type=Path, metavar="FILE.png", help="draw a few layers of one run with m = 3 (needs matplotlib)")
    add("--trace", type=Path, metavar="FILE", help="write that run for ui.perfetto.dev")
    parser.set_defaults(run=run, needs=PROGRAM_NEEDS)


def run(args: argparse.Namespace, command: str) -> None:
    from rich.console import Console

    from m2n.reference_model.report.timeline import draw_timeline, write_trace

    from . import bench
    from .report import plot, print_report, report

    options = _options_of(args)
    if args.links is not None:
        _run_links(args, command, options)
        return
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:
        options, shape, rounds = bench.run_rounds(options, status.update)
    about = report(options, shape, rounds)
    print_report(about, results_console(132))
    shown = rounds[-1]["runs"][bench.FIXED_MICROBATCH, options.ratios[len(options.ratios) // 2], 3]
    files = Files()
    files.write(args.json, lambda: save_json(args.json, command, **about))
    files.write(args.plot, lambda: plot(about, args.plot))
    files.write(args.timeline, lambda: draw_timeline(args.timeline, shown.traces, 3))
    files.write(args.trace, lambda: write_trace(args.trace, shown.traces))
    files.raise_faults()


def _run_links(args: argparse.Namespace, command: str, options: Any) -> None:
    from rich.console import Console

    from .links import require_links, run_rounds
    from .links_report import print_report, report

    links = parse_links(args.links)
    if any((args.plot, args.timeline, args.trace)):
        raise InputError("--links: draws no pictures and writes no trace: leave out --plot, --timeline and --trace")
    require_links()
    with Console(stderr=True, highlight=False).status("starting") as status:
        options, shape, rounds = run_rounds(options, links, status.update)
    about = report(options, shape, rounds)
    print_report(about, results_console(150))
    save_json(args.json, command, **about)


def _options_of(args: argparse.Namespace) -> Any:
    from .bench import LEAST_STEPS, Options

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
