# SPDX-License-Identifier: Apache-2.0
"""The traces of a run as a file for ui.perfetto.dev, and as a picture of a few layers."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .messages import Messages, match
from .pipeline import describe_times, summarise
from .trace import ATTENTION as ATTENTION_KIND
from .trace import COMMUNICATING, COMPUTING, DISPATCH_SEND, EXPERT, FIELDS, KINDS, ROUND, WAIT, Trace

_CATEGORIES = {
    **dict.fromkeys(COMPUTING, "computing"),
    **dict.fromkeys(COMMUNICATING, "communicating"),
    WAIT: "waiting",
    ROUND: "round",
}
# Okabe and Ito's colours, which are told apart by colour-blind eyes.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_LIGHT = 0.45  # alpha of what is not computing
_LAYERS_DRAWN = 4
_BEGIN, _END, _MICROBATCH = (FIELDS.index(name) for name in ("begin_ns", "end_ns", "microbatch"))


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, without changing what is there.

    Raises:
        InputError: with the path and the reason.
    """
    existed = os.path.exists(path)
    if existed and not os.path.isfile(path) and not os.path.isdir(path):
        # A pipe or a device: to the reader of a pipe the end of this look would be the end of the file.
        if not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
        return
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.unlink(os.path.realpath(path))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib: pip install 'm2n[bench]'")


def write_trace(path: str | Path, traces: Sequence[Trace], about: Mapping[str, Any] | None = None) -> None:
    """Write the events of all ranks in the Trace Event Format, with arrows from each message to its receiver.

    about: what else is to be known of the run.
    """
    messages = match(traces)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"displayTimeUnit": "ns", "otherData": {json.dumps(dict(about or {}))}, "traceEvents": [\n')
        for number, event in enumerate(_trace_events(messages)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")


def _trace_events(messages: Messages) -> Iterator[dict[str, Any]]:
    ordered = [*messages.attention, *messages.experts]
    zero_ns = min((int(each.field("begin_ns").min()) for each in ordered if len(each.events)), default=0)
    # Process 0 is the idle one to ui.perfetto.dev.
    for pid, each in enumerate(ordered, 1):
        place = {"pid": pid, "tid": pid}
        for name, about in (
            ("process_name", {"name": f"{each.role} {each.rank}"}),
            ("process_sort_index", {"sort_index": pid}),
            ("thread_name", {"name": f"{each.role} {each.rank}"}),
        ):
            yield {"ph": "M", "name": name, **place, "args": about}
        for kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, _ in each.events.tolist():
            args = {"step": step, "layer": layer, "microbatch": microbatch, "bytes": num_bytes or -1}
            yield {
                "ph": "X",
                "name": KINDS[kind],
                "cat": _CATEGORIES[kind],
                **place,
                "ts": (begin_ns - zero_ns) / 1e3,
                "dur": (end_ns - begin_ns) / 1e3,
                "args": {name: value for name, value in args.items() if value >= 0},
            }
    number = 0
    for arrows in _arrows(messages):
        about = {"name": arrows.name, "cat": "message"}
        sent_ns = arrows.sends[:, _BEGIN] - zero_ns
        # An arrow must not go back in time: who waits inside of the verb has begun to receive before.
        got_ns = np.maximum(arrows.receives[:, _BEGIN] - zero_ns, sent_ns)
        for sent, got in zip(sent_ns.tolist(), got_ns.tolist()):
            sender, receiver = arrows.sender + 1, arrows.receiver + 1
            yield {"ph": "s", **about, "id": number, "pid": sender, "tid": sender, "ts": sent / 1e3}
            yield {"ph": "f", "bp": "e", **about, "id": number, "pid": receiver, "tid": receiver, "ts": got / 1e3}
            number += 1


class _Arrows(NamedTuple):
    """The messages from one rank to another in one direction; ranks by their place, attention ranks first."""

    name: str
    sender: int
    receiver: int
    sends: np.ndarray  # the events that sent them, int64 [number of messages, len(FIELDS)]
    receives: np.ndarray  # the events that received them


def _arrows(messages: Messages) -> Iterator[_Arrows]:
    for link in messages.links:
        attention, expert = messages.attention[link.attention].events, messages.experts[link.expert].events
        batches, expert_row = messages.batches[link.expert], len(messages.attention) + link.expert
        got = expert[batches.first[link.batch]]
        yield _Arrows("dispatch", link.attention, expert_row, attention[link.dispatch_send], got)
        reply = batches.send[link.batch]
        is_known = (reply >= 0) & (link.combine_recv >= 0)
        sends, receives = expert[reply[is_known]], attention[link.combine_recv[is_known]]
        # combine_recv does not await the answer to a message without rows, which may come later.
        in_time = sends[:, _BEGIN] <= receives[:, _END]
        yield _Arrows("combine", expert_row, link.attention, sends[in_time], receives[in_time])


def draw_timeline(path: str | Path, traces: Sequence[Trace], microbatches: int, title: str = "") -> None:
    """Draw a few layers from the middle of a run: a row per rank, a colour per microbatch, lines for messages.

    Args:
        microbatches: m of the run.
        title: else the times that the traces tell.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    messages = match(traces)
    rows = [*messages.attention, *messages.experts]
    begin_ns, end_ns = _window(messages, microbatches)
    # 1400 pixels wide; up to 500 high for up to 12 ranks.
    height = min(1.4 + 0.75 * len(rows), max(5.0, 1.4 + 0.3 * len(rows)))
    figure = Figure(figsize=(14, height), layout="constrained")
    axis = figure.add_subplot()
    for row, each in enumerate(rows):
        _draw_rank(axis, len(rows) - 1 - row, each, begin_ns, end_ns)
    _draw_messages(axis, messages, begin_ns, end_ns)
    axis.set_xlim(0, (end_ns - begin_ns) / 1e6)
    axis.set_ylim(-0.5, max(len(rows), 1) - 0.5)
    axis.set_yticks(range(len(rows)), [f"{each.role} {each.rank}" for each in reversed(rows)])
    axis.set_xlabel("ms")
    if not title:
        times = describe_times(summarise(traces, microbatches))
        title = f"m = {microbatches}: {times}. Numbers are layers, gaps are waits"
    axis.set_title(title, fontsize=10)
    handles = [Patch(color=_COLORS[b % len(_COLORS)], label=f"microbatch {b}") for b in range(min(microbatches, 8))]
    handles.append(Patch(color="#555555", label="computing"))
    handles.append(Patch(color="#555555", alpha=_LIGHT, label="in a verb"))
    figure.legend(handles=handles, loc="outside lower center", ncols=10, fontsize=8, frameon=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    save_picture(figure, path)


def save_picture(figure: Any, path: str | Path, dpi: int = 100) -> None:
    """In the format that the name tells, else PNG; that of few colours, which is a third as large."""
    from PIL import Image

    suffix = Path(path).suffix.removeprefix(".").lower()
    with open(path, "wb") as file:
        if suffix != "png" and suffix in figure.canvas.get_supported_filetypes():
            figure.savefig(file, format=suffix)
            return
        pixels = io.BytesIO()
        figure.savefig(pixels, dpi=dpi, format="png")
        with Image.open(pixels) as image:
            image.convert("RGB").quantize(128).save(file, "PNG", optimize=True)


def _window(messages: Messages, microbatches: int) -> tuple[int, int]:
    """A few layers of all microbatches of the first attention rank that has any, from the middle of the run."""
    for each in messages.attention:
        sends = each.of_kind(DISPATCH_SEND)
        if len(sends):
            count = min(len(sends) - 1, _LAYERS_DRAWN * microbatches)
            first = (len(sends) - count) // 2
            return int(sends[first, _BEGIN]), int(sends[first + count, _END])
    return 0, 1


def _draw_rank(axis: Any, y: int, each: Trace, begin_ns: int, end_ns: int) -> None:
    axis.axhline(y, color="#DDDDDD", linewidth=0.8, zorder=0)
    inside = each.events[(each.field("end_ns") > begin_ns) & (each.field("begin_ns") < end_ns)]
    for kind, from_ns, to_ns, _, layer, microbatch, *_ in inside.tolist():
        if kind in (WAIT, ROUND):
            continue
        left, width = (from_ns - begin_ns) / 1e6, (to_ns - from_ns) / 1e6
        color = _COLORS[microbatch % len(_COLORS)]
        if kind in COMMUNICATING:
            axis.barh(y, width, 0.4, left, color=color, alpha=_LIGHT, linewidth=0)
            continue
        axis.barh(y, width, 0.62, left, color=color, edgecolor="white", linewidth=0.4)
        is_wide = to_ns - from_ns > (end_ns - begin_ns) / 60
        if kind in (ATTENTION_KIND, EXPERT) and is_wide and from_ns >= begin_ns and to_ns <= end_ns:
            axis.text(left + width / 2, y, str(layer), ha="center", va="center", fontsize=8, color="white")


def _draw_messages(axis: Any, messages: Messages, begin_ns: int, end_ns: int) -> None:
    """A line from the end of the verb that sent to the begin of what received."""
    from matplotlib.collections import LineCollection

    last_row = len(messages.attention) + len(messages.experts) - 1
    for arrows in _arrows(messages):
        sent_ns, got_ns = arrows.sends[:, _END], arrows.receives[:, _BEGIN]
        is_seen = (got_ns > begin_ns) & (sent_ns < end_ns)
        sent_ms, got_ms = ((column[is_seen] - begin_ns) / 1e6 for column in (sent_ns, got_ns))
        from_y, to_y = last_row - arrows.sender, last_row - arrows.receiver
        down = 0.31 if to_y < from_y else -0.31
        lines = [((sent, from_y - down), (got, to_y + down)) for sent, got in zip(sent_ms, got_ms)]
        colors = [_COLORS[b % len(_COLORS)] for b in arrows.sends[is_seen, _MICROBATCH].tolist()]
        axis.add_collection(LineCollection(lines, colors=colors, linewidths=0.8, alpha=0.7), autolim=False)
