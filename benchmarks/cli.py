# SPDX-License-Identifier: Apache-2.0
"""m2n-bench: the benchmarks, from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from m2n.reference_model.console.command import outlast_stdout, run_command
from m2n.reference_model.console.files import check_matplotlib, check_writable
from m2n.reference_model.errors import InputError, missing_packages

from .exchange import connect, copies, growth, instructions, latency, paper, perftest
from .pipeline import balance, e2e
from .pipeline.pingpong import command as pingpong

PROGRAM = "m2n-bench"
# Each brings its parser, run(args, command) that measures, prints and writes, and the packages that it needs.
_COMMANDS = (latency, connect, copies, growth, instructions, paper, perftest, e2e, balance, pingpong)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    description = "Benchmarks of m2n. Exit status: 0 done, 1 a run failed, 2 bad input."
    parser = argparse.ArgumentParser(prog=PROGRAM, description=description)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of m2n-bench; returns the exit status."""
    command = " ".join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run_command(PROGRAM, lambda: _run(build_parser().parse_args(argv), command))


def _run(args: argparse.Namespace, command: str) -> int:
    missing = missing_packages(args.needs)
    if missing:
        raise InputError(f"needs {', '.join(missing)}: pip install 'm2n[bench]'")
    from .harness.pool import WorkerFailed
    from .harness.runs import RunFailed

    for name in ("json", "plot", "timeline", "trace"):
        if path := getattr(args, name, None):
            check_writable(path)
            outlast_stdout()
    if any(getattr(args, name, None) for name in ("plot", "timeline")):
        check_matplotlib()
    try:
        args.run(args, command)
    except (WorkerFailed, RunFailed) as error:
        print(f"{PROGRAM}: a run failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
