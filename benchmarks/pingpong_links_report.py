# SPDX-License-Identifier: Apache-2.0
"""The results of `m2n-bench pingpong --links`: JSON and tables."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from m2n.reference_model.tables import print_table

from .links import Link
from .pingpong import MICROBATCHES, Options
from .pingpong_links import OneLink, message_bytes
from .pingpong_report import in_run, latencies
from .synthetic import ModelShape

Row = dict[str, Any]


def _median(values: Iterable[float], digits: int = 3) -> float:
    return round(statistics.median(values), digits)


def _link_row(options: Options, link: Link, rounds: Sequence[OneLink]) -> Row:
    """What the link is called, and what it gave."""

    def probed(name: str) -> float:
        return _median(one.probe[name] for one in rounds)

    return {
        "link": link.name,
        "rate_gbit": link.mbit / 1e3,
        "delay_ms": link.delay_us / 1e3,
        "tcp_round_trip_ms": probed("round_trip_ms"),
        "nominal_message_ms": round(link.message_ms(message_bytes(options)), 3),
        "tcp_message_ms": probed("message_ms"),
        "tcp_bulk_gbit": probed("bulk_gbit"),
        "t_c_ms": _median(one.t_c * 1e3 for one in rounds),
        "t_f_ms": _median(one.busy.t_f * 1e3 for one in rounds),
        "t_c_over_t_f": _median(one.t_c / one.busy.t_f for one in rounds),
        "relay_share": _median(one.relay_share for one in rounds),
    }


def _row(options: Options, link: Link, m: int, rounds: Sequence[OneLink]) -> Row:
    """One m over one link. A gain is over m = 1, the median of each round's own gain."""
    measured = [one.measured(options, m) for one in rounds]
    gains = [speed / one.measured(options, 1) for speed, one in zip(measured, rounds)]
    figures: Row = {
        "tokens_per_s": _median(measured, 1),
        "gain": _median(gains),
        "gain_min_max": [round(min(gains), 3), round(max(gains), 3)],
    }
    for name, simulated in (("simulated", OneLink.simulated), ("from_traces", OneLink.from_traces)):
        speeds = [simulated(one, options, m) for one in rounds]
        figures[f"{name}_tokens_per_s"] = _median(speeds, 1)
        figures[f"{name}_gain"] = _median(speed / simulated(one, options, 1) for speed, one in zip(speeds, rounds))
        figures[f"measured_over_{name}"] = _median(ours / theirs for ours, theirs in zip(measured, speeds))
    runs = [one.runs[m] for one in rounds]
    times = {name.replace("_us", "_ms"): in_run(runs, name)
             for name in ("t_a_us", "t_e_us", "t_c_us", "t_c_dispatch_us", "t_c_combine_us")}  # fmt: skip
    bubble = _median((run.pipeline["bubble"] for run in runs), 4)
    return {"link": link.name, "microbatches": m, **figures, **latencies(runs), "bubble": bubble, **times}


def report(options: Options, shape: ModelShape, rounds: Sequence[dict[Link, OneLink]]) -> Row:
    """Everything as JSON values, but for the machine and the command."""
    links = {link: [one[link] for one in rounds] for link in rounds[0]}
    whole = [one for each in links.values() for one in each]
    states = {"idle": [one.idle for one in whole], "busy": [one.busy for one in whole]}
    return {
        "options": dataclasses.asdict(options),
        "model": dataclasses.asdict(shape),
        "message_bytes": message_bytes(options),
        "times": {
            f"{name}_{state}_ms": _median(statistics.median(getattr(times, name)) * 1e3 for times in each)
            for state, each in states.items()
            for name in ("t_a", "t_e", "t_step")
        },
        "links": [_link_row(options, link, each) for link, each in links.items()],
        "rows": [_row(options, link, m, each) for link, each in links.items() for m in MICROBATCHES],
    }


_LINK_COLUMNS = {
    "tcp_round_trip_ms": "round trip ms", "nominal_message_ms": "message ms, nominal", "tcp_message_ms": "by TCP",
    "t_c_ms": "T_c", "t_c_over_t_f": "T_c/T_f", "tcp_bulk_gbit": "bulk Gbit/s", "relay_share": "relay, cores",
}  # fmt: skip
_COLUMNS = {
    "tokens_per_s": "tokens/s", "simulated_tokens_per_s": "simulated", "measured_over_simulated": "ratio",
    "measured_over_from_traces": "ratio, from traces", "gain": "gain over m = 1",
    "simulated_gain": "simulated", "from_traces_gain": "from traces", "t_a_ms": "T_a ms", "t_e_ms": "T_e ms",
    "t_c_ms": "T_c ms",
}  # fmt: skip


def print_report(about: Row, console: Console) -> None:
    """The tables, for people."""
    times = about["times"]
    console.print(
        f"messages of {about['message_bytes'] / 1024:.0f} KB; T_a {times['t_a_busy_ms']:.2f} ms and T_e "
        f"{times['t_e_busy_ms']:.2f} ms without m2n, both cores busy"
    )
    links = _table("what each link gives: plain TCP, and m2n with m = 1", ("link",), _LINK_COLUMNS, about["links"])
    print_table(console, links)
    print_table(console, _table("m microbatches over each link", ("link", "microbatches"), _COLUMNS, about["rows"]))


def _table(title: str, keys: tuple[str, ...], columns: dict[str, str], rows: Sequence[Row]) -> Table:
    table = Table(title=title, box=None, header_style="")
    for key in keys:
        table.add_column("m" if key == "microbatches" else key)
    for column in columns.values():
        table.add_column(column, justify="right")
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(str(row[key]) for key in keys), *("?" if value is None else f"{value:.2f}" for value in values))
    return table
