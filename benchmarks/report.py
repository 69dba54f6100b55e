# SPDX-License-Identifier: Apache-2.0
"""Tables, JSON, pictures and comparisons of rows of results; benchmarks/README.md explains the columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2n.reference_model.command import Files
from m2n.reference_model.errors import InputError
from m2n.reference_model.tables import print_table
from m2n.reference_model.timeline import save_picture

Row = dict[str, Any]
_CASE = ("m", "n", "bytes", "placement")  # one table each
_KEY = ("contender", "boundary", "direction", "m", "n", "bytes", "row_bytes", "dtype", "top_k", "reduce_at", "routing")
_COLUMNS = {
    "p50_us": "p50 us", "p90_us": "p90", "p99_us": "p99", "p999_us": "p99.9", "max_us": "max",
    "p50_min_us": "lowest p50", "p50_max_us": "highest p50", "throughput_gb_s": "GB/s", "p50_over_m2n": "p50 / m2n's",
    "p99_over_m2n": "p99 / m2n's",
}  # fmt: skip


def size_name(num_bytes: int) -> str:
    """As in "256 KB"; a KB is 1,024 bytes."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if num_bytes >= factor and num_bytes % factor == 0:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} B"


def print_rows(rows: Sequence[Row], console: Any, directions: Sequence[str]) -> None:
    """A table for each case; the other directions are in the JSON alone."""
    from rich.table import Table

    for case in dict.fromkeys(tuple(row[name] for name in _CASE) for row in rows):
        m, n, num_bytes, placement = case
        title = f"{m} attention x {n} expert ranks, {size_name(num_bytes)} per pair, {placement}"
        table = Table("contender", "boundary", "direction", *_COLUMNS.values(), title=title, title_justify="left")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in rows:
            if tuple(row[name] for name in _CASE) != case:
                continue
            if "reason" not in row and row["direction"] in directions:
                figures = [f"{row[name]:,.2f}" for name in _COLUMNS]
                table.add_row(row["contender"], row["boundary"], row["direction"], *figures)
        print_table(console, table)
        for row in rows:
            if tuple(row[name] for name in _CASE) == case and "reason" in row:
                console.print(f"{row['contender']} ({row['boundary']}): not run: {row['reason']}", markup=False)


def write_json(path: Path, about: dict[str, Any]) -> None:
    """{machine, command, options, rows, ...}.

    Raises:
        InputError: it cannot be written.
    """
    files = Files()
    files.write(path, lambda: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))
    files.raise_faults()


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run's JSON.

    Raises:
        InputError: it is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if all(name in row for name in _KEY)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--compare: {path} holds no results of m2n-bench ({type(error).__name__}: {error})"
        ) from error


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """For every row that both runs have: p50 and p99 before and now, and now over before.

    The runs were not interleaved: `limit_ratio` is the same ratio for memcpy (p50), the machine's own change.
    """

    def by_key(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
        return {tuple(row[name] for name in _KEY): row for row in rows if "p50_us" in row}

    before, now = by_key(old), by_key(new)
    compared = []
    for key in now.keys() & before.keys():
        limit = ("memcpy", "cpp", *key[2:])
        row = dict(zip(_KEY, key))
        for name in ("p50_us", "p99_us"):
            row[f"old_{name}"], row[f"new_{name}"] = before[key][name], now[key][name]
            row[f"{name[:3]}_ratio"] = round(now[key][name] / before[key][name], 3)
        if limit in now and limit in before:
            row["limit_ratio"] = round(now[limit]["p50_us"] / before[limit]["p50_us"], 3)
        compared.append(row)
    order = list(now)
    return sorted(compared, key=lambda row: order.index(tuple(row[name] for name in _KEY)))


def print_comparison(compared: Sequence[Row], console: Any) -> None:
    """Old and new side by side."""
    from rich.table import Table

    table = Table("contender", "boundary", "direction", "m x n", "size", "p50 old", "p50 new", "new / old", "memcpy's",
                  "p99 old", "p99 new", "new / old", title="against the earlier run (not interleaved)")  # fmt: skip
    for row in compared:
        table.add_row(
            row["contender"], row["boundary"], row["direction"], f"{row['m']} x {row['n']}", size_name(row["bytes"]),
            f"{row['old_p50_us']:,.2f}", f"{row['new_p50_us']:,.2f}", f"{row['p50_ratio']:.2f}",
            f"{row['limit_ratio']:.2f}" if "limit_ratio" in row else "", f"{row['old_p99_us']:,.2f}",
            f"{row['new_p99_us']:,.2f}", f"{row['p99_ratio']:.2f}",
        )  # fmt: skip
    print_table(console, table)


def plot(rows: Sequence[Row], path: Path) -> None:
    """p50 (lines) and p99 (dots) against bytes per pair, one picture for each (m, n) and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "p50_us" in row and row["contender"] != "hop"]
    panels = list(dict.fromkeys((row["m"], row["n"], row["direction"]) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        shown = [row for row in rows if (row["m"], row["n"], row["direction"]) == panel]
        for contender, boundary in dict.fromkeys((row["contender"], row["boundary"]) for row in shown):
            mine = [row for row in shown if (row["contender"], row["boundary"]) == (contender, boundary)]
            mine.sort(key=lambda row: row["bytes"])
            sizes = [row["bytes"] for row in mine]
            label = contender if boundary == "cpp" else f"{contender} (Python)"
            (line,) = axis.loglog(sizes, [row["p50_us"] for row in mine], marker="o", markersize=3, label=label)
            axis.loglog(sizes, [row["p99_us"] for row in mine], linestyle="none", marker="^", color=line.get_color())
        axis.set_title(f"{panel[2]}, {panel[0]} x {panel[1]} ({shown[0]['placement']})", fontsize=9)
        axis.set_xlabel("bytes per pair")
        axis.set_ylabel("us: p50 line, p99 triangles")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    save_picture(figure, path, dpi=110)
    pyplot.close(figure)
