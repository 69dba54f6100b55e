# SPDX-License-Identifier: Apache-2.0
"""m2n-bench perftest: m2n over UCX beside UCX's own measuring tool, ucx_perftest, on the same link and library."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections import defaultdict
from typing import Any

from m2n.reference_model.console.tables import print_table
from m2n.reference_model.errors import InputError

from ..harness import runs
from ..harness.cases import make_case
from ..harness.options import add_options, parse_list
from ..harness.plugins import native_transport
from ..harness.report import results_console, save_json

_ABOUT = """One way over TCP on loopback, medians of rounds in which ucx_perftest, m2n and UCX's tagged messages
(ucx-tcp) take turns, pinned to the same two cores. ucx_perftest sends one piece in a loop and does not read it. m2n and
ucx-tcp do the job of `latency`: rows with others between them, read by their receiver, or summed; m2n sends expert ids
and weights too. All should load the same UCX: name it by M2N_UCX_LIBRARY, and to the others by LD_LIBRARY_PATH."""
_TESTS = ("ucp_am_lat", "tag_lat")
_GOAL_RATIO = 1.25
_TIMEOUT_S = 60


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("perftest", help="m2n over UCX beside ucx_perftest", description=_ABOUT)
    add_options(parser, sizes="1024,262144")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--perftest", default="ucx_perftest", metavar="PATH", help="default %(default)s")
    parser.add_argument("--iterations", type=int, default=5000, help="of ucx_perftest in a round (default %(default)s)")
    parser.set_defaults(run=run, needs=("rich", "numpy"), transport="ucx", baselines="")


def run(args: argparse.Namespace, command: str) -> None:
    """Measures, prints, writes.

    Raises:
        InputError: no such tool, or numbers out of range. RunFailed: with what a rank, or the tool, has said.
    """
    from rich.table import Table

    tool = shutil.which(args.perftest)
    if tool is None:
        raise InputError(f"--perftest: {args.perftest!r} is not there: apt-get install ucx-utils")
    if args.rounds < 1 or args.iterations < 100:
        raise InputError("--rounds, --iterations: expected at least 1 and 100")
    cases = [make_case(1, 1, size, args) for size in parse_list("--sizes", args.sizes)]
    if any(len(case.cores) != 2 for case in cases):
        raise InputError("--pin: two cores are needed")
    plan = runs.make_plan(("ucx-tcp",), 1, args.seconds)
    rows = []
    for case in cases:
        p50_us: dict[str, list[float]] = defaultdict(list)
        for _ in range(args.rounds):
            for test in _TESTS:
                p50_us[test].append(perftest_us(tool, test, case.num_bytes, args.iterations, case.cores))
            for row in runs.measure(case, plan, lambda: None):
                if "p50_us" in row:
                    halves = 2 if row["direction"] == "roundtrip" else 1
                    p50_us[f"{row['contender']} {row['direction']}"].append(row["p50_us"] / halves)
        medians = {name: statistics.median(values) for name, values in p50_us.items()}
        for name, values in p50_us.items():
            of_job = medians.get(name.replace("m2n", "ucx-tcp")) if name.startswith("m2n") else None
            rows.append({
                "what": name, "bytes": case.num_bytes, "one_way_p50_us": medians[name], "rounds_us": values,
                "over_ucp_am_lat": medians[name] / medians["ucp_am_lat"],
                "over_ucx_tcp": None if of_job is None else medians[name] / of_job,
            })  # fmt: skip
    columns = ("bytes", "what", "one way p50 us", "lowest", "highest", "/ ucp_am_lat", "/ ucx-tcp, same job")
    table = Table(*columns, title="medians of rounds")
    for row in rows:
        numbers = (row["one_way_p50_us"], min(row["rounds_us"]), max(row["rounds_us"]), row["over_ucp_am_lat"])
        of_job = "" if row["over_ucx_tcp"] is None else f"{row['over_ucx_tcp']:.2f}"
        table.add_row(str(row["bytes"]), row["what"], *(f"{number:.2f}" for number in numbers), of_job)
    print_table(results_console(120), table)
    options = {"rounds": args.rounds, "iterations": args.iterations, "native_transport": native_transport("ucx")}
    about = {"environment": _environment(), "tool": _version(tool), "options": options}
    save_json(args.json, command, **about, goal=_GOAL_RATIO, rows=rows)


def _environment() -> dict[str, str]:
    names = [name for name in os.environ if name.startswith("UCX_") or name in ("LD_LIBRARY_PATH", "M2N_UCX_LIBRARY")]
    return {name: os.environ[name] for name in sorted(names)}


def _version(tool: str) -> str:
    info = shutil.which("ucx_info") or os.path.join(os.path.dirname(tool), "ucx_info")
    try:
        done = subprocess.run([info, "-v"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except OSError:
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].lstrip("# ")


def perftest_us(tool: str, test: str, num_bytes: int, iterations: int, cores: tuple[int, ...]) -> float:
    """One run of the tool: its median one-way latency in us."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", **os.environ}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    options = ["-t", test, "-s", str(num_bytes), "-n", str(iterations), "-w", str(iterations // 10), "-f"]
    server = subprocess.Popen(["taskset", "-c", str(cores[1]), tool, "-p", port], **quiet)
    try:
        until = time.monotonic() + _TIMEOUT_S
        command = ["taskset", "-c", str(cores[0]), tool, "-p", port, "127.0.0.1", *options]
        while True:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
            # "Final:", where it is printed; iterations; then the percentile.
            found = re.search(r"^\s*(?:Final:)?\s*\d+\s+([\d.]+)", done.stdout.splitlines()[-1] if done.stdout else "")
            if done.returncode == 0 and found:
                return float(found[1])
            if time.monotonic() > until:
                raise runs.RunFailed(f"ucx_perftest: {(done.stderr or done.stdout)[-500:]}")
            time.sleep(0.05)  # the server does not listen yet
    finally:
        server.kill()
        server.wait()
