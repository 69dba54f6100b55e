# SPDX-License-Identifier: Apache-2.0
"""m2n-bench connect: what it takes to join, and what those feel who exchange meanwhile."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import m2n
from m2n.reference_model.console.tables import print_table
from m2n.reference_model.errors import InputError

from ..harness.cases import SHARED_FOLDER
from ..harness.options import add_outputs, parse_list
from ..harness.report import results_console, save_json
from . import connect_ranks
from .connect_ranks import Processes, Setup, receive

_TIMEOUT_S = 60.0
_NUM_EXPERTS = 16
_QUIET_S = 0.03  # after it the expert ranks have forgotten the last one that left

_ROW = {"contender": "m2n", "boundary": "python"}
_GOAL_MS, _GOAL_RATIO = 5.0, 1.2

_ABOUT = """The time to join, per pair of ranks: that of AttentionComm(...) in a process that runs already, with expert
ranks that listen, over their number. And what 3 x 2 ranks that exchange without a pause feel of a joiner that connects
and leaves again and again: their round trips in phases without it, with it, and with a process that computes for as
long instead, which take turns."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("connect", help="the time to join, and what others feel of it", description=_ABOUT)
    add = parser.add_argument
    add("--expert-ranks", default="1,2,4,8", metavar="N,...", help="that are joined (default %(default)s)")
    add("--samples", type=int, default=60, help="joins, and as many rejoins, for each N (default %(default)s)")
    add("--rounds", type=int, default=8, help="of phases quiet, joining and busy (default %(default)s)")
    add("--phase-seconds", type=float, default=0.5, metavar="S", help="of each (default %(default)s)")
    add_outputs(parser)
    parser.set_defaults(run=run, needs=("rich", "numpy"))


def run(args: argparse.Namespace, command: str) -> None:
    """Measures, prints, writes.

    Raises:
        InputError: numbers out of range. RunFailed: with what a rank has said.
    """
    expert_ranks = parse_list("--expert-ranks", args.expert_ranks)
    checks = (
        (all(_NUM_EXPERTS % num == 0 for num in expert_ranks if num > 0), "--expert-ranks", args.expert_ranks),
        (min(expert_ranks) > 0, "--expert-ranks", args.expert_ranks),
        (1 <= args.samples <= 1000, "--samples", args.samples),
        (1 <= args.rounds <= 100, "--rounds", args.rounds),
        (0 < args.phase_seconds <= 60, "--phase-seconds", args.phase_seconds),
    )
    expected = {"--expert-ranks": "1, 2, 4, 8 or 16", "--samples": "1 to 1000", "--rounds": "1 to 100"}
    for is_fine, option, value in checks:
        if not is_fine:
            raise InputError(f"{option}: expected {expected.get(option, 'at most 60 s')}, got {value}")
    rows = measure_join(expert_ranks, args.samples)
    rows.append(measure_disturbance(rounds=args.rounds, phase_s=args.phase_seconds))
    print_rows(rows, results_console(132))
    save_json(args.json, command, rows=rows)


def print_rows(rows: Sequence[dict[str, Any]], console: Any) -> None:
    """A table of joins, and two lines about the disturbance, each beside its goal."""
    from rich.table import Table

    *joins, felt = rows
    table = Table("expert ranks", "", "p50 ms", "p99 ms", "max ms", "samples", title="Time to join, per pair of ranks")
    for row in joins:
        words = [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms", "max_ms")]
        table.add_row(str(row["n"]), row["direction"], *words, str(row["count"]))
    print_table(console, table)
    console.print(f"Goal: at most {_GOAL_MS:g} ms a pair.")
    for name in ("quiet", "busy", "joining"):
        console.print(
            f"{felt['m']} x {felt['n']} ranks, {name}: round trip p50 {felt[name]['p50_us']:.0f} us, "
            f"p99 {felt[name]['p99_us']:.0f} us, {felt[name]['count']} samples"
        )
    console.print(
        f"p99 joining / quiet: {felt['p99_ratio']:.2f} ({felt['p99_ratio_min']:.2f} to {felt['p99_ratio_max']:.2f}), "
        f"joining / busy: {felt['p99_over_busy']:.2f}; {felt['joins']} joins of {felt['join_p50_ms']:.1f} ms a pair. "
        f"Goal: at most {_GOAL_RATIO:g} of quiet."
    )


def _shape(num_tokens: int) -> m2n.Shape:
    """Rows of 8 KB, as Mixtral's. float16: numpy has no bfloat16, and joining moves no rows."""
    return m2n.Shape(
        hidden=4096, num_experts=_NUM_EXPERTS, top_k=2, max_tokens=num_tokens, microbatches=2,
        dispatch_dtype="float16", combine_dtype="float16",
    )  # fmt: skip


def measure_join(
    expert_ranks: Sequence[int] = (1, 2, 4, 8), samples: int = 60, num_tokens: int = 32
) -> list[dict[str, Any]]:
    """The time to join, per pair: that of AttentionComm(...) in a running process, over its number of expert ranks.

    Expert ranks are processes that listen already. "join": as an attention rank that nobody has seen, while nothing
    else happens; "rejoin": as the same rank again, at once after it has left.

    Returns:
        One dictionary for each number of expert ranks (at most 16) and kind: p50_ms, p99_ms, max_ms, count.

    Raises:
        RunFailed: with what a rank has said.
    """
    rows = []
    for num_expert in expert_ranks:
        with tempfile.TemporaryDirectory(prefix="m2n-", dir=SHARED_FOLDER) as folder, Processes() as processes:
            setup = Setup(folder, _shape(num_tokens), num_expert, max_peers=2 * samples + 2)
            experts = [processes.start(connect_ranks.listen, setup, rank) for rank in range(num_expert)]
            for expert in experts:
                receive(expert, _TIMEOUT_S)
            # The first join of a process finds nothing warm.
            kinds = {"join": (range(1, samples + 2), _QUIET_S), "rejoin": ([0] * (samples + 1), 0.0)}
            for kind, (ranks, pause_s) in kinds.items():
                times_s = receive(processes.start(connect_ranks.join, setup, ranks, pause_s), _TIMEOUT_S)[1:]
                per_pair_ms = np.array(times_s) * 1e3 / num_expert
                rows.append({**_ROW, "direction": kind, "m": 1, "n": num_expert, **_summary(per_pair_ms, "ms")})
            for expert in experts:
                expert.send(None)
                receive(expert, _TIMEOUT_S)
    return rows


def measure_disturbance(
    num_attention: int = 3,
    num_expert: int = 2,
    rounds: int = 8,
    phase_s: float = 0.5,
    joins_per_phase: int = 20,
    pause_s: float = 0.005,
    num_tokens: int = 32,
) -> dict[str, Any]:
    """What a joiner does to the round trips of num_attention x num_expert links that exchange without a pause.

    All processes stay; three kinds of phases take turns, `rounds` times, `phase_s` seconds each. In "joining" another
    process connects to all expert ranks, leaves and pauses, up to `joins_per_phase` times; in "busy" it computes for
    as long instead, which shows what the scheduler alone does where processes share cores; in "quiet" it sleeps.

    Returns:
        "quiet", "joining", "busy": p50_us, p99_us, max_us, count of all such phases. p99_ratio: joining / quiet, the
        median over the rounds, with p99_ratio_min and p99_ratio_max; p99_over_busy: joining / busy likewise; p50_ratio.
        "joins", and "join_p50_ms": per pair, while all exchange.

    Raises:
        RunFailed: with what a rank has said.
    """
    num_phases = connect_ranks.NUM_KINDS * (rounds + 1)  # the first round warms up
    max_peers = num_attention + joins_per_phase * (rounds + 1)
    with tempfile.TemporaryDirectory(prefix="m2n-", dir=SHARED_FOLDER) as folder, Processes() as processes:
        setup = Setup(folder, _shape(num_tokens), num_expert, max_peers)
        phase = setup.phase()
        experts = [processes.start(connect_ranks.serve, setup, rank) for rank in range(num_expert)]
        attention = [processes.start(connect_ranks.exchange, setup, rank) for rank in range(num_attention)]
        joiner = processes.start(connect_ranks.join_by_phase, setup, num_attention, joins_per_phase, pause_s)
        for rank in (*experts, *attention, joiner):
            receive(rank, _TIMEOUT_S)
        for number in range(num_phases):
            phase[0] = number
            time.sleep(phase_s)
        phase[0] = connect_ranks.LEAVING
        results = [receive(rank, _TIMEOUT_S) for rank in attention]
        joins_s = receive(joiner, _TIMEOUT_S)
        phase[0] = connect_ranks.ENDED
        for rank in experts:
            receive(rank, _TIMEOUT_S)
    phases, times_us = (np.concatenate(parts) for parts in zip(*results))
    of_phase = [times_us[phases == number] for number in range(connect_ranks.NUM_KINDS, num_phases)]
    return {
        **_ROW, "direction": "disturbance", "m": num_attention, "n": num_expert,
        **_compare(*(of_phase[kind :: connect_ranks.NUM_KINDS] for kind in range(connect_ranks.NUM_KINDS))),
        "joins": len(joins_s), "join_p50_ms": round(statistics.median(joins_s) * 1e3 / num_expert, 3),
    }  # fmt: skip


def _compare(quiet: Sequence[np.ndarray], joining: Sequence[np.ndarray], busy: Sequence[np.ndarray]) -> dict[str, Any]:
    def ratios(share: float, below: Sequence[np.ndarray]) -> list[float]:
        return [float(np.percentile(a, share) / np.percentile(b, share)) for a, b in zip(joining, below)]

    values = {
        "p50_ratio": statistics.median(ratios(50, quiet)),
        "p99_ratio": statistics.median(ratios(99, quiet)),
        "p99_ratio_min": min(ratios(99, quiet)),
        "p99_ratio_max": max(ratios(99, quiet)),
        "p99_over_busy": statistics.median(ratios(99, busy)),
    }
    kinds = {"quiet": quiet, "joining": joining, "busy": busy}
    parts = {name: _summary(np.concatenate(each), "us") for name, each in kinds.items()}
    return {**parts, **{name: round(value, 3) for name, value in values.items()}}


def _summary(values: np.ndarray, unit: str) -> dict[str, Any]:
    parts = {"p50": np.percentile(values, 50), "p99": np.percentile(values, 99), "max": values.max()}
    return {f"{name}_{unit}": round(float(value), 3) for name, value in parts.items()} | {"count": len(values)}
