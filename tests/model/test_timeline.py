# SPDX-License-Identifier: Apache-2.0
"""The timeline of a run: the trace file, the picture, and files that cannot be written."""

from __future__ import annotations

import importlib.util
import json
import os
import select
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toy_pipeline import Toy, hand_made

from m2n.reference_model import trace as tr
from m2n.reference_model.console.files import check_matplotlib, check_writable
from m2n.reference_model.errors import InputError
from m2n.reference_model.report.timeline import draw_timeline, write_trace
from m2n.reference_model.trace import KINDS, Trace


def written(path: Path, traces: list[Trace]) -> list[dict[str, Any]]:
    write_trace(path, traces)
    about = json.loads(path.read_text())
    assert about["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = about["traceEvents"]
    return events


def test_the_trace_file_has_every_event_of_every_rank(tmp_path: Path) -> None:
    toy = Toy(microbatches=2, attention_ranks=2, expert_ranks=3)
    traces = toy.traces()
    events = written(tmp_path / "trace.json", traces[::-1])
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert list(names) == ["attention 0", "attention 1", "expert 0", "expert 1", "expert 2"]
    assert sorted(names.values()) == list(names.values()) and min(names.values()) > 0
    first_ns = min(trace.field("begin_ns").min() for trace in traces)
    for trace in traces:
        pid = names[f"{trace.role} {trace.rank}"]
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        assert len(slices) == len(trace.events)
        for event, (kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, _) in zip(
            slices, trace.events.tolist()
        ):
            assert event["name"] == KINDS[kind] and event["tid"] == pid
            assert event["ts"] == (begin_ns - first_ns) / 1e3 and event["dur"] == (end_ns - begin_ns) / 1e3
            expected = {"step": step, "layer": layer, "microbatch": microbatch, "bytes": num_bytes or -1}
            assert event["args"] == {name: value for name, value in expected.items() if value != -1}
    categories = {e["name"]: e["cat"] for e in events if e["ph"] == "X"}
    assert categories["attention"] == categories["expert"] == categories["embed"] == "computing"
    assert categories["wait"] == "waiting"
    assert {name for name, category in categories.items() if category == "communicating"} == {
        "dispatch_send", "dispatch_recv", "combine_send", "combine_recv",
    }  # fmt: skip


def slice_at(events: list[dict[str, Any]], flow: dict[str, Any]) -> dict[str, Any]:
    """The event in which an arrow begins or ends."""
    at_ns = round(1000 * flow["ts"])
    slices = [e for e in events if e["ph"] == "X" and e["pid"] == flow["pid"]]
    (found,) = (e for e in slices if 0 <= at_ns - round(1000 * e["ts"]) < round(1000 * e["dur"]))
    return found


def test_arrows_join_each_message_with_what_received_it(tmp_path: Path) -> None:
    toy = Toy(microbatches=2, attention_ranks=2, expert_ranks=2, layers=2, steps=2, jitter=0.2)
    events = written(tmp_path / "trace.json", toy.traces())
    flows: dict[int, dict[str, dict[str, Any]]] = {}
    for event in events:
        if event["ph"] in "sf":
            flows.setdefault(event["id"], {})[event["ph"]] = event
    assert all(set(flow) == {"s", "f"} for flow in flows.values())
    num_messages = 2 * 2 * 2 * 2 * 2
    assert Counter(flow["s"]["name"] for flow in flows.values()) == {"dispatch": num_messages, "combine": num_messages}
    for flow in flows.values():
        begin, end = slice_at(events, flow["s"]), slice_at(events, flow["f"])
        kinds = {"dispatch": ("dispatch_send", "dispatch_recv"), "combine": ("combine_send", "combine_recv")}
        assert (begin["name"], end["name"]) == kinds[flow["s"]["name"]] and flow["f"]["name"] == flow["s"]["name"]
        assert all(begin["args"][name] == end["args"][name] for name in ("layer", "microbatch"))
        assert flow["s"]["ts"] <= flow["f"]["ts"] and flow["f"]["bp"] == "e"


def test_answers_without_rows_and_receivers_that_wait_inside_of_the_verb(tmp_path: Path) -> None:
    place = (0, 0, 0, 64)
    attention = hand_made("attention", 0, (tr.DISPATCH_SEND, 1000, 1500, *place), (tr.COMBINE_RECV, 1600, 1700, *place))
    batch = (tr.DISPATCH_RECV, 800, 1550, -1, 0, 0, 0, 1)  # it waited inside
    experts = [
        hand_made("expert", 0, batch, (tr.COMBINE_SEND, 1560, 1650, -1, 0, 0)),
        hand_made("expert", 1, batch, (tr.COMBINE_SEND, 1800, 1900, -1, 0, 0)),  # nobody waited for it
    ]
    events = written(tmp_path / "trace.json", [attention, *experts])
    flows = [(e["ph"], e["name"], e["pid"], e["ts"]) for e in events if e["ph"] in "sf"]
    assert flows == [
        ("s", "dispatch", 1, 0.2), ("f", "dispatch", 2, 0.2),
        ("s", "combine", 2, 0.76), ("f", "combine", 1, 0.8),
        ("s", "dispatch", 1, 0.2), ("f", "dispatch", 3, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize("traces", [[], [hand_made("attention", 0)]])
def test_a_run_without_events_is_written(tmp_path: Path, traces: list[Trace]) -> None:
    events = written(tmp_path / "trace.json", traces)
    assert all(event["ph"] == "M" for event in events)


@pytest.mark.parametrize(
    "name, toy",
    [
        ("timeline.any", Toy(microbatches=1)),
        ("timeline.png", Toy(microbatches=3, attention_ranks=2, expert_ranks=2, layers=12, jitter=0.2)),
    ],
)
def test_the_picture_is_a_small_png(tmp_path: Path, name: str, toy: Toy) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / name
    draw_timeline(path, toy.traces(), toy.microbatches)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 1000 <= image.width <= 1600 and 200 <= image.height <= 500
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 16)}
    near = [
        any(sum(abs(a - b) for a, b in zip(color, of)) < 24 for color in colors)
        for of in ((0, 114, 178), (230, 159, 0), (0, 158, 115))
    ]
    assert near == [b < toy.microbatches for b in range(3)]


def test_a_picture_of_nothing_and_of_one_message(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = hand_made("attention", 0, (tr.DISPATCH_SEND, 5, 9, 0, 0, 0))
    for number, traces in enumerate(([], [hand_made("attention", 0)], [one], [one, hand_made("expert", 0)])):
        draw_timeline(tmp_path / f"{number}.svg", traces, 2, "title of it")
        assert "<svg" in (tmp_path / f"{number}.svg").read_text()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("", "Is a directory"),
        ("missing/trace.json", "No such file or directory"),
        ("file/trace.json", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("kept")
    path = tmp_path / name
    with pytest.raises(InputError) as caught:
        check_writable(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_place_of_the_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="/proc/trace.json"):
        check_writable("/proc/trace.json")


def test_the_look_at_a_file_leaves_everything_as_it_was(tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to(tmp_path / "target")
    before = old.stat().st_mtime_ns
    for path in (old, link, tmp_path / "new"):
        check_writable(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "old"] and link.is_symlink()
    assert old.read_text() == "kept" and old.stat().st_mtime_ns == before


def test_the_reader_of_a_pipe_sees_no_end_before_the_trace(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        reader = select.poll()
        reader.register(descriptor)
        check_writable(pipe)
        assert reader.poll(0) == []  # not hung up
    finally:
        os.close(descriptor)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'm2n\[bench\]'"):
        check_matplotlib()
