# SPDX-License-Identifier: Apache-2.0
"""The results of the ping-pong ablation: JSON, tables and the plot."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from m2n.reference_model.tables import print_table
from m2n.reference_model.timeline import save_picture
from m2n.reference_model.trace import ATTENTION, SAMPLE, Tracer

from .pingpong import FIXED_GLOBAL_BATCH, FIXED_MICROBATCH, MICROBATCHES, Measured, Options
from .synthetic import ModelShape

# Figure 14 of the paper: 1.9 for 1 to 2; for 2 to 3 three models, whose T_c/T_f follows from 1 + T_c/T_f.
PAPER = {"gain_1_to_2": 1.9, "gain_2_to_3": {0.1: 1.10, 0.28: 1.28, 0.38: 1.38}}
_PAIRS = {"gain_1_to_2": (1, 2), "gain_2_to_3": (2, 3), "gain_3_to_4": (3, 4)}
Round = dict[str, Any]


def _median(of: Callable[[Round], float], rounds: Sequence[Round], digits: int = 4) -> float:
    return round(statistics.median(of(one) for one in rounds), digits)


def _gains(table: str, options: Options, rounds: Sequence[Round]) -> dict[str, list[dict[str, Any]]]:
    """For each step of m: the gain in tokens/s, measured and simulated, medians of each round's own gain."""
    gains: dict[str, list[dict[str, Any]]] = {}
    for name, (fewer, more) in _PAIRS.items():
        gains[name] = []
        for ratio in options.ratios:
            measured = [
                one["runs"][table, ratio, more].tokens_per_s / one["runs"][table, ratio, fewer].tokens_per_s
                for one in rounds
            ]
            simulated = [one["simulated"][table, ratio, more] / one["simulated"][table, ratio, fewer] for one in rounds]
            of_simulated = [ours / theirs for ours, theirs in zip(measured, simulated)]
            gain = {
                "tc_over_tf": ratio,
                "measured": round(statistics.median(measured), 3),
                "simulated": round(statistics.median(simulated), 3),
                "measured_over_simulated": round(statistics.median(of_simulated), 3),
                "measured_min_max": [round(min(measured), 3), round(max(measured), 3)],
            }
            paper = PAPER.get(name)
            gain["paper"] = paper.get(ratio) if isinstance(paper, dict) else paper
            gains[name].append(gain)
    return gains


def latencies(runs: Sequence[Measured]) -> dict[str, float]:
    """Percentiles over the runs' samples, all rounds together, in ms."""
    between = np.array([sample for run in runs for sample in run.between_tokens_s]) * 1e3
    first = np.array([sample for run in runs for sample in run.first_token_s]) * 1e3
    names = {"between_tokens_p50_ms": (between, 50), "between_tokens_p99_ms": (between, 99)}
    names["first_token_p50_ms"] = (first, 50)
    return {name: round(float(np.percentile(samples, q)), 2) for name, (samples, q) in names.items()}


def in_run(runs: Sequence[Measured], name: str) -> float | None:
    """A time as the traces of the runs have it, verbs included, in ms; None where it could not be seen."""
    times = [run.pipeline[name] for run in runs if run.pipeline[name] is not None]
    return round(statistics.median(times) / 1e3, 3) if times else None


def _rows(table: str, options: Options, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    rows = []
    for ratio in options.ratios:
        for m in MICROBATCHES:
            place = (table, ratio, m)
            runs = [one["runs"][place] for one in rounds]
            measured = _median(lambda one, at=place: one["runs"][at].tokens_per_s, rounds, 1)
            simulated = _median(lambda one, at=place: one["simulated"][at], rounds, 1)
            over = _median(lambda one, at=place: one["runs"][at].tokens_per_s / one["simulated"][at], rounds)
            row = {
                "tc_over_tf": ratio,
                "microbatches": m,
                "sequences_per_microbatch": options.sizes[table, m],
                "tokens_per_s": measured,
                "simulated_tokens_per_s": simulated,
                "measured_over_simulated": over,
                **latencies(runs),
                "bubble": round(statistics.median(run.pipeline["bubble"] for run in runs), 4),
                "t_a_ms": in_run(runs, "t_a_us"),
                "t_e_ms": in_run(runs, "t_e_us"),
                "t_c_ms": in_run(runs, "t_c_us"),
                "held_ms": round(statistics.median(run.pipeline["held_us"] for run in runs) / 1e3, 4),
            }
            rows.append(row)
    return rows


def _times(options: Options, rounds: Sequence[Round]) -> dict[str, Any]:
    """T_a and T_e in ms, the other core idle and busy; medians of the rounds' medians, by sequences."""
    return {
        str(size): {
            f"{name}_{state}_ms": _median(
                lambda one, at=(state, size, name): statistics.median(getattr(one[at[0]][at[1]], at[2])) * 1e3,
                rounds,
            )
            for name in ("t_a", "t_e", "t_step")
            for state in ("idle", "busy")
        }
        for size in sorted(set(options.sizes.values()))
    }


def _cores_speedup(options: Options, one: Round) -> float:
    """How much more two busy cores do than one: each side's time alone over its time beside the other, added."""
    alone, busy = one["alone"], one["busy"][options.sequences]
    return sum(
        statistics.median(getattr(alone, name)) / statistics.median(getattr(busy, name)) for name in ("t_a", "t_e")
    )


def _trace_cost(options: Options, rounds: Sequence[Round]) -> dict[str, float]:
    """What recording costs the busier rank: its events per step of a microbatch, and their share of the step."""
    tracer, count = Tracer(), 20_000
    at = began = tracer.now()
    for _ in range(count):
        at = tracer.add(ATTENTION, at, 0, 0, 0)
    event_ns = (at - began) / count
    run = rounds[-1]["runs"][FIXED_MICROBATCH, options.ratios[0], 2]
    events = max(len(each.events) for each in run.traces) / sum(len(each.of_kind(SAMPLE)) for each in run.traces)
    step_ns = statistics.median(run.between_tokens_s) * 1e9 / 2  # of one microbatch of the two
    return {
        "ns_per_event": round(event_ns),
        "events_per_step": round(events, 1),
        "step_ms": round(step_ns / 1e6, 3),
        "share_of_step": round(event_ns * events / step_ns, 5),
    }


def report(options: Options, shape: ModelShape, rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything as JSON values, but for the machine and the command."""
    gains = _gains(FIXED_MICROBATCH, options, rounds)
    first = rounds[0]["deployments"]
    return {
        "options": dataclasses.asdict(options),
        "model": dataclasses.asdict(shape),
        "cores_speedup": _median(lambda one: _cores_speedup(options, one), rounds, 3),
        "t_f_ms": _median(lambda one: one["t_f"] * 1e3, rounds),
        "times_by_sequences": _times(options, rounds),
        "trace_cost": _trace_cost(options, rounds),
        **gains,
        "fixed_microbatch": {"rows": _rows(FIXED_MICROBATCH, options, rounds)},
        "fixed_global_batch": {
            **_gains(FIXED_GLOBAL_BATCH, options, rounds),
            "rows": _rows(FIXED_GLOBAL_BATCH, options, rounds),
        },
        "deployments": [
            {
                "name": name,
                "tokens_per_s": _median(lambda one, at=name: one["deployments"][at].tokens_per_s, rounds, 1),
                **latencies([one["deployments"][name] for one in rounds]),
            }
            for name in first
        ],
    }


def print_report(about: dict[str, Any], console: Console) -> None:
    """The tables, for people."""
    console.print(
        f"two busy cores do {about['cores_speedup']:.2f} x the work of one; T_f = {about['t_f_ms']:.2f} ms, both busy"
    )
    cost = about["trace_cost"]
    console.print(
        f"traces: {cost['ns_per_event']} ns an event, {cost['events_per_step']} events in a step of "
        f"{cost['step_ms']:.1f} ms: {100 * cost['share_of_step']:.2f} %"
    )
    for title, part in (("fixed microbatch size", about), ("fixed global batch", about["fixed_global_batch"])):
        table = Table(title=f"gain in tokens/s, {title}: measured / simulated (paper)", box=None, header_style="")
        table.add_column("T_c/T_f")
        for name in _PAIRS:
            table.add_column(name.replace("gain_", "m = ").replace("_", " "), justify="right")
        for at, ratio in enumerate(about["options"]["ratios"]):
            table.add_row(f"{ratio:.2f}", *(_cell(part[name][at]) for name in _PAIRS))
        print_table(console, table)
    for title, name in (("fixed microbatch size", "fixed_microbatch"), ("fixed global batch", "fixed_global_batch")):
        print_table(console, _rows_table(title, about[name]["rows"]))
    table = Table(title="the same two cores, used otherwise; T_c = 0", box=None, header_style="")
    for column in ("deployment", "tokens/s", "between tokens p50, p99 ms", "first token ms"):
        table.add_column(column, justify="left" if column == "deployment" else "right")
    for row in about["deployments"]:
        table.add_row(row["name"], f"{row['tokens_per_s']:.0f}", *_latency_cells(row))
    print_table(console, table)


def _cell(gain: dict[str, Any]) -> str:
    paper = "" if gain["paper"] is None else f" ({gain['paper']})"
    return f"{gain['measured']:.2f} / {gain['simulated']:.2f}{paper}"


def _latency_cells(row: dict[str, Any]) -> tuple[str, str]:
    between = f"{row['between_tokens_p50_ms']:.1f}, {row['between_tokens_p99_ms']:.1f}"
    return between, f"{row['first_token_p50_ms']:.1f}"


def _rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title}", box=None, header_style="")
    columns = ("T_c/T_f", "m", "sequences", "tokens/s", "simulated", "ratio", "bubble %", "between tokens p50, p99 ms",
               "first token ms")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tc_over_tf']:.2f}",
            str(row["microbatches"]),
            str(row["sequences_per_microbatch"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['simulated_tokens_per_s']:.0f}",
            f"{row['measured_over_simulated']:.2f}",
            f"{100 * row['bubble']:.0f}",
            *_latency_cells(row),
        )
    return table


def plot(about: dict[str, Any], path: Path) -> None:
    """The gains against T_c/T_f: measured, simulated, and the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    colors = dict(zip(_PAIRS, ("#0072B2", "#D55E00", "#009E73")))
    parts = (("fixed microbatch size", about), ("fixed global batch", about["fixed_global_batch"]))
    for axis, (title, part) in zip(axes, parts):
        for name, color in colors.items():
            ratios = [gain["tc_over_tf"] for gain in part[name]]
            label = f"m = {_PAIRS[name][0]} to {_PAIRS[name][1]}"
            low_high = np.array([gain["measured_min_max"] for gain in part[name]]).T
            measured = np.array([gain["measured"] for gain in part[name]])
            axis.errorbar(ratios, measured, np.abs(low_high - measured), color=color, fmt="o-", capsize=3, label=label)
            axis.plot(ratios, [gain["simulated"] for gain in part[name]], color=color, linestyle="--")
        if part is about:
            points = PAPER["gain_2_to_3"]
            assert isinstance(points, dict)
            axis.plot(list(points), list(points.values()), "k*", markersize=10, label="paper, 2 to 3", zorder=5)
        axis.set_title(title)
        axis.set_xlabel("T_c / T_f")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", ncols=2)
    axes[0].set_ylabel("gain in tokens/s")
    axes[0].set_ylim(0.7, 3.0)
    figure.suptitle("What one more microbatch gains: measured (solid, min to max of the rounds), simulated (dashed)")
    figure.tight_layout()
    save_picture(figure, path, dpi=110)
    pyplot.close(figure)
