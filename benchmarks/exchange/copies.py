# SPDX-License-Identifier: Apache-2.0
"""m2n-bench copies: how often a CPU writes each byte of payload, by our own counters and by a count of memcpy."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2n.reference_model.console.children import python_command
from m2n.reference_model.console.tables import print_table
from m2n.reference_model.errors import InputError

from ..harness.cases import SHARED_FOLDER
from ..harness.options import add_outputs, parse_list
from ..harness.report import Row, results_console, save_json, size_name
from ..harness.routing import make_topk
from ..harness.runs import RunFailed, run_processes

ROW_BYTES = 2048
_TIMEOUT_S = 60.0
_TOP_K = 2
_SOURCE = Path(__file__).parents[1] / "contenders/native/count_copies.c"
_COMPILE = ("-O2", "-shared", "-fPIC", "-fno-builtin", "-fno-tree-loop-distribute-patterns", "-U_FORTIFY_SOURCE")
# What must come out for each byte of payload, written by calls or by sums; the sum of combine_recv is one write of y.
EXPECTED = {
    "dispatch_send": 1.0,
    "dispatch_recv": 0.0,
    "combine_send, reduced": 1.0,
    "combine_send, sums": 1.0,
}

_ABOUT = """How often a CPU writes each byte of payload: by m2n's own counters (comm.stats()), and by a library that is
loaded in front of the C library and counts memcpy, memmove, write, send, read and the like. Both must agree, and what
arrived must lie in the window. Beside it the same rows over Unix sockets. Sums make no call: their bytes are those of
our counters alone. M2N_STORES=regular keeps m2n from stores that pass the caches by, which no call shows."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("copies", help="how often a CPU writes each byte", description=_ABOUT)
    parser.add_argument("--sizes", default="8192,262144", metavar="BYTES,...", help="per pair (default %(default)s)")
    parser.add_argument("--expert-ranks", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--rounds", type=int, default=20, help="that are counted (default 20)")
    parser.add_argument(
        "--extra-copy", choices=("attention", "expert"), help="one deliberate copy there, which the check must find"
    )
    add_outputs(parser)
    parser.set_defaults(run=run, needs=("rich", "numpy"))


def run(args: argparse.Namespace, command: str) -> None:
    """Counts, prints, writes.

    Raises:
        InputError: sizes or counts out of range. RunFailed: a rank failed, or the counts do not agree.
    """
    sizes = parse_list("--sizes", args.sizes)
    for size in sizes:
        if size < ROW_BYTES or size % ROW_BYTES:
            raise InputError(f"--sizes: expected whole rows of {ROW_BYTES} bytes, got {size}")
    if args.expert_ranks not in (1, 2, 4, 8):
        raise InputError(f"--expert-ranks: expected 1, 2, 4 or 8, got {args.expert_ranks}")
    if args.rounds < 2:
        raise InputError(f"--rounds: expected at least 2, got {args.rounds}")
    with tempfile.TemporaryDirectory(prefix="m2n-", dir=SHARED_FOLDER) as name:
        library, reason = compile_counter(Path(name))
        rows: list[Row] = []
        for size in sizes:
            folder = Path(name) / str(size)
            folder.mkdir()
            rows += count(folder, size, args.expert_ranks, args.rounds, args.extra_copy or "", library)
    if library is None:
        rows.append({"contender": "memcpy counter", "reason": reason})
    print_rows(rows, results_console(160))
    save_json(args.json, command, rows=rows)
    wrong = [row for row in rows if row.get("agrees") is False]
    if wrong:
        raise RunFailed("; ".join(describe(row) for row in wrong))


def compile_counter(folder: Path) -> tuple[Path | None, str]:
    """The library for LD_PRELOAD in `folder`, or None and why there is none."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None, "no C compiler: apt-get install gcc; only m2n's own counters were read"
    library = folder / "count_copies.so"
    command = [compiler, *_COMPILE, str(_SOURCE), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        return None, f"{_SOURCE.name} does not compile: {lines[0] if lines else 'the compiler gives no reason'}"
    return library, ""


def count(folder: Path, num_bytes: int, n: int, rounds: int, extra_copy: str, library: Path | None) -> list[Row]:
    """Runs one attention rank and n expert ranks in processes; rows by contender, side and verb.

    Args:
        folder: empty; the ranks meet there.
        num_bytes: of rows from the attention rank to each expert rank, in a round.
        extra_copy: "attention" or "expert": a rank there makes a copy that it need not. "": nobody does.
        library: from compile_counter; None: memcpy is not counted.

    Raises:
        RunFailed: a rank failed.
    """
    num_experts = max(8, n)
    ids = make_topk("balanced", 1, n, num_bytes // ROW_BYTES, num_experts, _TOP_K)[0]
    np.save(folder / "topk.npy", ids)
    about = {"rounds": rounds, "n": n, "row_bytes": ROW_BYTES, "num_experts": num_experts, "extra_copy": extra_copy}
    (folder / "case.json").write_text(json.dumps(about), encoding="utf-8")
    preload = ["env", "M2N_STORES=regular", *([] if library is None else [f"LD_PRELOAD={library}"])]
    rank = [*preload, *python_command("m2n.benchmarks.exchange.copies_ranks", folder)]
    run_processes([[*rank, "attention", "0"], *([*rank, "expert", str(i)] for i in range(n))], _TIMEOUT_S)
    found: dict[tuple[str, str, str], Row] = {}
    for path in sorted(folder.glob("*.*.json")):
        side = path.name.split(".")[0]
        for counts in json.loads(path.read_text(encoding="utf-8")):
            contender, verb = counts.pop("contender"), counts.pop("verb")
            key = contender, side, verb
            row = found.setdefault(key, {"contender": contender, "side": side, "verb": verb, "bytes": num_bytes})
            for name, value in counts.items():
                row[name] = row.get(name, 0) + value
    return [judge({**row, "n": n, "row_bytes": ROW_BYTES, "rounds": rounds}) for row in found.values()]


def judge(row: Row) -> Row:
    """The row with `copies_per_byte` and, for m2n, whether both counts `agree` with each other and with EXPECTED."""
    summed = row.get("summed_bytes", 0)
    is_counted = "memcpy_bytes" in row
    called = row["memcpy_bytes"] + row["kernel_bytes"] if is_counted else row.get("counted_bytes", 0) - summed
    row["copies_per_byte"] = round((called + summed) / row["payload_bytes"], 4)
    if row["contender"] == "m2n":
        is_fine = called + summed == row["counted_bytes"] and row.get("outside_window", 0) == 0
        row["agrees"] = is_fine and row["copies_per_byte"] == EXPECTED.get(row["verb"], row["copies_per_byte"])
    return row


def describe(row: Row) -> str:
    """What does not agree, in words."""
    if row.get("outside_window"):
        return f"{row['outside_window']} rows at {row['verb']} do not lie in the window"
    return (
        f"{row['verb']} at {size_name(row['bytes'])}: {row['memcpy_bytes'] + row['kernel_bytes']} bytes in calls and "
        f"{row.get('summed_bytes', 0)} in sums, by m2n's own counters {row['counted_bytes']} in all"
    )


def print_rows(rows: Sequence[Row], console: Any) -> None:
    """One table; what could not be counted below it."""
    from rich.table import Table

    table = Table("size", "contender", "side", "verb", title="Bytes written by a CPU for each byte of payload")
    for name in ("payload", "memcpy", "kernel", "sums", "m2n's counters", "beside rows", "copies", "agrees"):
        table.add_column(name, justify="right")
    for row in rows:
        if "reason" in row:
            continue
        figures = [row.get(f"{name}_bytes") for name in ("payload", "memcpy", "kernel", "summed", "counted", "beside")]
        words = ["" if value is None else f"{value:,}" for value in figures]
        agrees = {True: "yes", False: "NO", None: ""}[row.get("agrees")]
        table.add_row(
            size_name(row["bytes"]), row["contender"], row["side"], row["verb"], *words,
            f"{row['copies_per_byte']:.2f}", agrees,
        )  # fmt: skip
    print_table(console, table)
    for row in rows:
        if "reason" in row:
            console.print(f"{row['contender']}: {row['reason']}")
