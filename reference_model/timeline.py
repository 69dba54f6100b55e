# SPDX-License-Identifier: Apache-2.0
"""The traces of a run as a file for ui.perfetto.dev, and as a picture of a few layers."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .messages import Messages, match
from .trace import ATTENTION as ATTENTION_KIND
from .trace import COMMUNICATING, COMPUTING, DISPATCH_SEND, EXPERT, KINDS, WAIT, Trace

_CATEGORIES = {
    **dict.fromkeys(COMPUTING, "computing"),
    **dict.fromkeys(COMMUNICATING, "communicating"),
    WAIT: "waiting",
}
# Okabe and Ito's colours, which are told apart by colour-blind eyes.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_LAYERS_DRAWN = 4


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, without changing what is there.

    Raises:
        InputError: with the path and the reason.
    """
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if not existed:
        os.unlink(path)


def check_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib: pip install 'm2n[bench]'")


def write_trace(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write the events of all ranks in the Trace Event Format, with arrows from each message to its receiver."""
    messages = match(traces)
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        for number, event in enumerate(_trace_events(messages)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")


def _trace_events(messages: Messages) -> Iterator[dict[str, Any]]:
    ordered = [*messages.attention, *messages.experts]
    begins = [int(each.field("begin_ns").min()) for each in ordered if len(each.events)]
    zero_ns = min(begins, default=0)
    for pid, each in enumerate(ordered):
        name = f"{each.role} {each.rank}"
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        for kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, _ in each.events.tolist():
            about = {"step": step, "layer": layer, "microbatch": microbatch, "bytes": num_bytes or -1}
            yield {
                "ph": "X",
                "name": KINDS[kind],
                "cat": _CATEGORIES[kind],
                "pid": pid,
                "tid": 0,
                "ts": (begin_ns - zero_ns) / 1e3,
                "dur": (end_ns - begin_ns) / 1e3,
                "args": {name: value for name, value in about.items() if value >= 0},
            }
    for number, (name, sender, receiver) in enumerate(_arrows(messages)):
        for phase, (pid, time_ns) in (("s", sender), ("f", receiver)):
            event = {"ph": phase, "name": name, "cat": "message", "id": number, "pid": pid, "tid": 0}
            yield {**event, "ts": (time_ns - zero_ns) / 1e3, **({"bp": "e"} if phase == "f" else {})}


def _arrows(messages: Messages) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """(name, (pid, ns) in the sending event, (pid, ns) in the receiving event) of every message."""
    for link in messages.links:
        attention, expert = messages.attention[link.attention], messages.experts[link.expert]
        batches, expert_pid = messages.batches[link.expert], len(messages.attention) + link.expert
        begin_ns, expert_begin_ns = attention.field("begin_ns"), expert.field("begin_ns")
        columns = zip(link.dispatch_send.tolist(), link.batch.tolist(), link.combine_recv.tolist())
        for send, batch, receive in columns:
            got = int(batches.first[batch])
            yield "dispatch", (link.attention, int(begin_ns[send])), (expert_pid, int(expert_begin_ns[got]))
            reply = int(batches.send[batch])
            # combine_recv may come before the answer to an empty message, which it does not await.
            if reply >= 0 and receive >= 0 and expert_begin_ns[reply] <= attention.field("end_ns")[receive]:
                at_ns = max(int(begin_ns[receive]), int(expert_begin_ns[reply]))
                yield "combine", (expert_pid, int(expert_begin_ns[reply])), (link.attention, at_ns)


def draw_timeline(path: str | Path, traces: Sequence[Trace], microbatches: int, title: str = "") -> None:
    """Draw a few layers from the middle of a run: a row per rank, a colour per microbatch, lines for messages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    messages = match(traces)
    rows = [*messages.attention, *messages.experts]
    begin_ns, end_ns = _window(messages, microbatches)
    figure, axis = pyplot.subplots(figsize=(14, 1.6 + 0.75 * len(rows)))
    for row, each in enumerate(rows):
        _draw_rank(axis, len(rows) - 1 - row, each, begin_ns, end_ns)
    _draw_messages(axis, messages, begin_ns, end_ns)
    axis.set_xlim(0, (end_ns - begin_ns) / 1e6)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [f"{each.role} {each.rank}" for each in reversed(rows)])
    axis.set_xlabel("ms")
    axis.set_title(title or f"{microbatches} microbatches; numbers are layers, gaps are waits", fontsize=10)
    handles = [Patch(color=_COLORS[b % len(_COLORS)], label=f"microbatch {b}") for b in range(min(microbatches, 8))]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch="/////", label="communicating"))
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=9, fontsize=8, frameon=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def _window(messages: Messages, microbatches: int) -> tuple[int, int]:
    """A few layers of all microbatches of the first attention rank that has any, from the middle of the run."""
    for each in messages.attention:
        sends = each.of_kind(DISPATCH_SEND)
        if len(sends):
            count = min(len(sends) - 1, _LAYERS_DRAWN * microbatches)
            first = (len(sends) - count) // 2
            return int(sends[first, 1]), int(sends[first + count, 2])
    return 0, 1


def _draw_rank(axis: Any, y: int, each: Trace, begin_ns: int, end_ns: int) -> None:
    axis.axhline(y, color="#DDDDDD", linewidth=0.8, zorder=0)
    inside = each.events[(each.field("end_ns") > begin_ns) & (each.field("begin_ns") < end_ns)]
    for kind, from_ns, to_ns, _, layer, microbatch, *_ in inside.tolist():
        if kind == WAIT:
            continue
        left, width = (from_ns - begin_ns) / 1e6, (to_ns - from_ns) / 1e6
        color = _COLORS[microbatch % len(_COLORS)]
        if kind in COMMUNICATING:
            axis.barh(y, width, 0.44, left, facecolor="white", edgecolor=color, hatch="/////", linewidth=0.5)
            continue
        axis.barh(y, width, 0.62, left, color=color, edgecolor="white", linewidth=0.4)
        is_wide = to_ns - from_ns > (end_ns - begin_ns) / 60
        if kind in (ATTENTION_KIND, EXPERT) and is_wide and from_ns >= begin_ns and to_ns <= end_ns:
            axis.text(left + width / 2, y, str(layer), ha="center", va="center", fontsize=8, color="white")


def _draw_messages(axis: Any, messages: Messages, begin_ns: int, end_ns: int) -> None:
    """A line from the end of the verb that sent to the begin of what received."""
    num_rows = len(messages.attention) + len(messages.experts)
    for link in messages.links:
        attention, expert = messages.attention[link.attention], messages.experts[link.expert]
        batches = messages.batches[link.expert]
        upper, lower = num_rows - 1 - link.attention, len(messages.experts) - 1 - link.expert
        for send, batch, receive in np.stack((link.dispatch_send, link.batch, link.combine_recv), 1).tolist():
            color = _COLORS[int(attention.field("microbatch")[send]) % len(_COLORS)]
            sent_ns, got_ns = attention.field("end_ns")[send], expert.field("begin_ns")[batches.first[batch]]
            lines = [(sent_ns, upper - 0.31, got_ns, lower + 0.31)]
            reply = int(batches.send[batch])
            if reply >= 0 and receive >= 0:
                replied_ns, taken_ns = expert.field("end_ns")[reply], attention.field("begin_ns")[receive]
                lines.append((replied_ns, lower + 0.31, taken_ns, upper - 0.31))
            for from_ns, from_y, to_ns, to_y in lines:
                if begin_ns <= from_ns <= to_ns <= end_ns:
                    x = ((from_ns - begin_ns) / 1e6, (to_ns - begin_ns) / 1e6)
                    axis.plot(x, (from_y, to_y), color=color, linewidth=0.8, alpha=0.7)
