# SPDX-License-Identifier: Apache-2.0
"""The pipeline summary: T_a, T_e and T_c of runs where they are known, the constraints, and what is advised."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from toy_pipeline import Toy, hand_made  # noqa: E402

from m2n.reference_model import trace as tr  # noqa: E402
from m2n.reference_model.report.messages import match  # noqa: E402
from m2n.reference_model.report.summary import HELD_BACK, HIDDEN, WAITED_FOR, describe, summarise  # noqa: E402
from m2n.reference_model.trace import ALL_RANKS, MAX_EVENTS, Trace, Tracer  # noqa: E402


def summary_of(toy: Toy, **options: Any) -> dict[str, Any]:
    return summarise(toy.traces(), toy.microbatches, **options)


def times(summary: dict[str, Any]) -> tuple[float, float, float]:
    return summary["t_a_us"], summary["t_e_us"], summary["t_c_us"]


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_times_are_recovered(microbatches: int, ranks: tuple[int, int]) -> None:
    # Attention is slower than the experts, so that these wait for messages whatever m is.
    toy = Toy(500_000, 400_000, 90_000, microbatches, *ranks)
    summary = summary_of(toy)
    assert times(summary) == (500, 400, 90)
    assert summary["t_c_dispatch_us"] == summary["t_c_combine_us"] == 90
    assert summary["t_f_us"] == 500 and summary["t_c_over_t_f"] == 0.18
    assert summary["t_c_source"] == WAITED_FOR
    assert summary["t_c_samples"] == summary["t_c_dispatch_samples"] + summary["t_c_combine_samples"] >= 5
    assert summary["counts"]["steps"] == toy.steps and summary["counts"]["layers"] == toy.layers


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_times_of_random_runs_are_recovered(data: st.DataObject) -> None:
    draws = {name: st.integers(20, 900).map(lambda time: 1000 * time) for name in ("t_a", "t_e", "t_c")}
    draws |= dict.fromkeys(("attention_ranks", "expert_ranks", "microbatches"), st.integers(1, 3))
    draws |= {"layers": st.integers(2, 4), "seed": st.integers(0, 99)}
    toy = Toy(**{name: data.draw(strategy) for name, strategy in draws.items()}, jitter=0.05)
    traces = toy.traces()
    summary = summarise(traces, toy.microbatches)
    assert summary["t_a_us"] == pytest.approx(toy.t_a / 1e3, rel=0.05)
    assert summary["t_e_us"] == pytest.approx(toy.t_e / 1e3, rel=0.05)
    if summary["t_c_source"] == WAITED_FOR:
        assert summary["t_c_us"] == pytest.approx(toy.t_c / 1e3, abs=1e-3)
    # Nobody's share is lost, and all are of the same span.
    for rank in summary["ranks"]:
        shares = [rank[name] for name in ("busy", "communicating", "waiting", "other")]
        assert all(0 <= share <= 1 for share in shares) and sum(shares) == pytest.approx(1, abs=1e-5)
    idle = sum(rank["waiting"] + rank["other"] for rank in summary["ranks"]) / len(summary["ranks"])
    assert summary["bubble"] == pytest.approx(idle, abs=1e-3)
    assert json.loads(json.dumps(summary)) == summary and all(isinstance(line, str) for line in describe(summary))
    assert 1 <= len(summary["advice"]) <= 3


def test_where_nobody_waits_the_wire_is_hidden() -> None:
    toy = Toy(microbatches=4)
    summary = summary_of(toy)
    # Only as the pipeline fills and drains.
    assert summary["t_c_samples"] < 5
    assert (summary["t_c_us"], summary["t_c_source"], summary["t_c_over_t_f"]) == (None, HIDDEN, None)
    assert [summary["constraints"][name]["holds"] for name in "123"] == [True, None, None]
    assert summary["bubble"] < 0.05
    assert "T_c hidden" in "\n".join(describe(summary))
    held = summary_of(toy, held_us=150.0)
    assert (held["t_c_us"], held["t_c_source"]) == (150, HELD_BACK)
    assert [held["constraints"][name]["holds"] for name in "123"] == [True, True, True]
    # What was seen counts, not what was meant.
    seen = summary_of(dataclasses.replace(toy, microbatches=1), held_us=150.0)
    assert (seen["t_c_us"], seen["t_c_source"]) == (100, WAITED_FOR)


ADVICE = [
    (Toy(microbatches=3, attention_ranks=2, t_e=420_000), (True, True, True), ["nothing needs to change"]),
    (Toy(microbatches=3, t_e=720_000), (False, True, True), ["T_e is 1.8 x T_a: the experts are the bottleneck"]),
    (Toy(microbatches=3, t_a=720_000), (False, True, True), ["T_a is 1.8 x T_e: attention is the bottleneck"]),
    (Toy(microbatches=2, t_c=152_000), (True, True, False), ["m = 2 is too few for T_c/T_f = 0.38: 3 microbatches"]),
    # Here ranks begin to wait after the message was sent.
    (Toy(microbatches=3, t_c=260_000), (True, True, False), ["m = 3 is too few for T_c/T_f = 0.65: 4 microbatches"]),
    (Toy(microbatches=3, t_c=380_000), (True, True, False), ["m = 3 is too few for T_c/T_f = 0.95: 4 microbatches"]),
    (Toy(microbatches=3, t_c=500_000), (True, False, False), ["T_c is 1.2 x T_f: the network", "5 microbatches"]),
    (Toy(microbatches=1, t_e=720_000), (False, True, False), ["m = 1 is too few", "T_e is 1.8 x T_a"]),
    (Toy(microbatches=2, t_c=150_000, verbs=0.7), (True, True, False), ["m = 2 is too few", "in the verbs"]),
    # Not full by (3), which is for T_a = T_e, but full all the same.
    (Toy(microbatches=2, t_e=720_000), (False, True, False), ["T_e is 1.8 x T_a"]),
    (
        Toy(microbatches=1, t_c=900_000, t_e=300_000, verbs=0.9),
        (False, False, False),
        ["T_c is 2.2 x T_f", "m = 1 is too few", "T_a is 1.3 x T_e"],
    ),
]


@pytest.mark.parametrize("toy, holds, says", ADVICE)
def test_constraints_and_advice(toy: Toy, holds: tuple[bool, ...], says: list[str]) -> None:
    summary = summary_of(toy)
    assert tuple(summary["constraints"][name]["holds"] for name in "123") == holds
    assert len(summary["advice"]) == len(says), summary["advice"]
    for sentence, part in zip(summary["advice"], says):
        assert part in sentence
    lines = describe(summary)
    assert lines[-len(says) :] == summary["advice"] and len(lines) <= 8


def test_small_microbatches_and_idle_ranks_are_told() -> None:
    (advice,) = summary_of(Toy(microbatches=3, verbs=0.5))["advice"]
    assert "the microbatches are too small" in advice
    # Balanced and full while they work, but one of three attention ranks has no sequences.
    traces = [*Toy(microbatches=3).traces(), hand_made("attention", 1), hand_made("attention", 2)]
    (advice,) = summarise(traces, 3)["advice"]
    assert "the ranks are idle for" in advice


def test_shares_are_of_the_time_from_the_first_to_the_last_attention_event() -> None:
    traces = [
        hand_made("expert", 0, (tr.WAIT, 0, 1400), (tr.EXPERT, 1400, 1500), (tr.WAIT, 1500, 9000)),
        hand_made("attention", 1, (tr.EMBED, 1100, 1300), (tr.SAMPLE, 1900, 2000)),
        hand_made("attention", 0, (tr.EMBED, 1000, 1200), (tr.COMBINE_RECV, 1200, 1300), (tr.WAIT, 1400, 1600)),
    ]
    summary = summarise(traces, 2)
    assert summary["ranks"] == [
        {"role": "attention", "rank": 0, "busy": 0.2, "communicating": 0.1, "waiting": 0.2, "other": 0.5},
        {"role": "attention", "rank": 1, "busy": 0.3, "communicating": 0, "waiting": 0, "other": 0.7},
        {"role": "expert", "rank": 0, "busy": 0.1, "communicating": 0, "waiting": 0.9, "other": 0},
    ]
    assert summary["bubble"] == pytest.approx(1 - 0.2 - 0.1 / 3, abs=1e-3)


def test_layers_without_experts_do_not_count() -> None:
    toy = Toy(t_e=300_000, layers=6, dense_layers=(0, 1, 2, 4))
    summary = summary_of(toy)
    assert times(summary) == (400, 300, 100)
    assert summary["counts"]["layers"] == 6 and summary["counts"]["layers_with_experts"] == 2


def test_empty_microbatches_of_strict_lockstep_do_not_count() -> None:
    toy = Toy(400_000, 300_000, 60_000, 3, 3, 2, empty_ranks=(0, 2))
    summary = summary_of(toy)
    assert times(summary) == (400, 300, 60)
    # Where all are empty there is nothing to say.
    nothing = summary_of(dataclasses.replace(toy, empty_ranks=(0, 1, 2)))
    assert (nothing["t_a_us"], nothing["t_e_us"], nothing["t_f_us"]) == (None, None, None)
    assert "nothing can be said" in nothing["advice"][0]


@pytest.mark.parametrize("attention_ranks", [1, 2, 3])
def test_batches_of_some_attention_ranks_add_up_to_one_of_all(attention_ranks: int) -> None:
    toy = Toy(600_000, 200_000, 50_000, 3, attention_ranks, 2, waits_for_all=False)
    summary = summary_of(toy)
    assert summary["t_e_us"] == 200 * attention_ranks
    # Batches that do not hold all ranks may have lingered for the others: they do not tell the wire.
    assert (summary["t_c_dispatch_samples"] > 0) == (attention_ranks == 1)
    assert summary["t_c_combine_us"] in (None, 50)


def test_batches_of_more_ranks_than_bits_hold_them_all() -> None:
    toy = Toy(500_000, 400_000, 90_000, 2, attention_ranks=3)
    full = summary_of(toy)
    assert summary_of(dataclasses.replace(toy, mask=ALL_RANKS)) == full
    # Ranks above the mask.
    renamed = [
        dataclasses.replace(trace, rank=trace.rank + 70) if trace.role == "attention" else trace
        for trace in dataclasses.replace(toy, mask=ALL_RANKS).traces()
    ]
    assert times(summarise(renamed, 2)) == times(full)


def test_where_a_batch_is_missing_the_later_ones_are_not_mistaken() -> None:
    toy = Toy(500_000, 400_000, 90_000, 1, 1, 2, layers=3, steps=10)
    attention, intact, broken = toy.traces()
    is_lost = (broken.field("layer") == 1) & (broken.field("begin_ns") > broken.field("begin_ns")[60])
    first_lost = is_lost.nonzero()[0][:3]
    kept = dataclasses.replace(broken, events=broken.events[[i for i in range(len(is_lost)) if i not in first_lost]])
    whole, part = summarise([attention, intact, broken], 1), summarise([attention, intact, kept], 1)
    assert times(part) == times(whole)
    assert part["t_c_dispatch_us"] == part["t_c_combine_us"] == 90
    assert 5 < part["t_c_combine_samples"] < whole["t_c_combine_samples"]
    for link in match([attention, intact, kept]).links:
        of_batches = (intact, kept)[link.expert].of_kind(tr.DISPATCH_RECV)[link.batch, 4]
        assert (attention.events[link.dispatch_send, 4] == of_batches).all()


def cut(trace: Trace, count: int) -> Trace:
    return dataclasses.replace(trace, events=trace.events[:count], num_dropped=len(trace.events) - count)


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_events_that_were_dropped(role: str) -> None:
    toy = Toy(500_000, 400_000, 90_000, 2, 2, 2, steps=10)
    traces = toy.traces()
    last_end = min(trace.field("end_ns")[100] for trace in traces if trace.role == role)
    half = [cut(trace, 101) if trace.role == role else trace for trace in traces]
    summary = summarise(half, 2)
    assert times(summary) == (500, 400, 90)
    assert summary["counts"]["dropped"] == sum(trace.num_dropped for trace in half) > 0
    assert any(f"{summary['counts']['dropped']} later events" in line for line in describe(summary))
    # The shares end with the first rank's kept events: what it did then is not known.
    until = [dataclasses.replace(t, events=t.events[t.field("begin_ns") < last_end]) for t in traces]
    assert summary["bubble"] == pytest.approx(summarise(until, 2)["bubble"], abs=0.02)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_loss_of_events_is_survived(data: st.DataObject) -> None:
    toy = Toy(microbatches=data.draw(st.integers(1, 3)), attention_ranks=2, expert_ranks=2, steps=2)
    traces = []
    for trace in toy.traces():
        if data.draw(st.booleans()):
            trace = cut(trace, data.draw(st.integers(0, len(trace.events))))
        if data.draw(st.booleans()):
            is_kept = [data.draw(st.integers(0, 9)) > 0 for _ in range(len(trace.events))]
            trace = dataclasses.replace(trace, events=trace.events[is_kept])
        if data.draw(st.integers(0, 4)):
            traces.append(trace)
    summary = summarise(traces, toy.microbatches)
    json.dumps(summary, allow_nan=False)
    assert describe(summary)
    assert all(time is None or time >= 0 for time in (*times(summary), summary["t_f_us"]))


def test_no_events_at_all() -> None:
    for traces in ([], [hand_made("attention", 0)], [hand_made("expert", 0), hand_made("attention", 0)]):
        summary = summarise(traces, 2)
        assert (summary["t_a_us"], summary["t_e_us"], summary["t_c_us"]) == (None, None, None)
        assert [rank["other"] for rank in summary["ranks"]] == [1.0] * len(traces)
        assert describe(summary)[-1] == summary["advice"][0]


def exchange(wait: tuple[int, int], waits_for: int, reply: tuple[int, int], received_at: int) -> list[Trace]:
    """Six times the same: microbatch 0 of layer 0 goes to two experts; expert 1 replies early, expert 0 at `reply`."""
    attention, fast, slow = [], [], []
    for step in range(6):
        at = 10_000 * (step + 1)
        place = (step, 0, 0, 64)
        attention += [
            (tr.ATTENTION, at, at + 100, *place),
            (tr.DISPATCH_SEND, at + 100, at + 200, *place),
            (tr.WAIT, at + wait[0], at + wait[1], -1, -1, waits_for),
            (tr.COMBINE_RECV, at + received_at, at + received_at + 10, *place),
        ]
        about = (-1, 0, 0, 64)
        fast += [(tr.DISPATCH_RECV, at + 300, at + 310, *about, 1), (tr.COMBINE_SEND, at + 310, at + 400, *about)]
        slow += [
            (tr.DISPATCH_RECV, at + 300, at + 310, *about, 1),
            (tr.COMBINE_SEND, at + reply[0], at + reply[1], *about),
        ]
    return [hand_made("attention", 0, *attention), hand_made("expert", 0, *slow), hand_made("expert", 1, *fast)]


@pytest.mark.parametrize(
    "wait, waits_for, reply, t_c",
    [
        ((200, 1500), 0, (900, 1000), 0.5),
        ((1000, 1500), 0, (900, 1000), None),  # the wait began after the answer had left: the way is hidden
        ((200, 1500), 1, (900, 1000), None),  # that wait ended for another microbatch
        ((200, 980), 0, (900, 1000), 0.0),  # the answer was there before the verb that sent it had ended
        ((200, 700), 0, (900, 1000), 0.3),  # expert 0's has no rows: nobody waits for it, and expert 1's came at 400
    ],
)
def test_which_answers_tell_the_wire(
    wait: tuple[int, int], waits_for: int, reply: tuple[int, int], t_c: float | None
) -> None:
    summary = summarise(exchange(wait, waits_for, reply, wait[1]), 1)
    assert summary["t_c_us"] == t_c
    assert summary["t_c_samples"] == (0 if t_c is None else 6)


def test_a_wait_that_an_idle_rank_interrupts_is_one_wait() -> None:
    traces = exchange((200, 1500), 0, (900, 1000), 1500)
    row = traces[0].events.tolist()
    for idx in reversed([idx for idx, event in enumerate(row) if event[0] == tr.WAIT]):
        begin, end = row[idx][1:3]
        row[idx : idx + 1] = [[*row[idx][:2], begin + 900, *row[idx][3:]], [tr.WAIT, begin + 900, end, *row[idx][3:]]]
    # Its second part began after the answer had left.
    assert summarise([hand_made("attention", 0, *row), *traces[1:]], 1)["t_c_us"] == 0.5


def test_a_recorded_trace_travels_and_counts_what_it_drops() -> None:
    tracer = Tracer(max_events=3)
    for layer in range(5):
        tracer.add(tr.ATTENTION, tracer.now(), 0, layer, 1, 7, ALL_RANKS)
    trace = Trace.decode("attention", 4, json.loads(json.dumps(tracer.encode())))
    assert (trace.role, trace.rank, trace.num_dropped, len(trace.events)) == ("attention", 4, 2, 3)
    assert trace.field("layer").tolist() == [0, 1, 2] and trace.field("ranks").tolist() == [ALL_RANKS] * 3
    assert (trace.field("end_ns") >= trace.field("begin_ns")).all()
    assert tracer.seconds((tr.ATTENTION,)) >= 0 and MAX_EVENTS > 3


def test_traces_of_several_hosts_come_on_the_clock_of_the_first_attention_rank() -> None:
    """Two attention ranks on two hosts, an expert rank on a third and one beside the first attention rank."""
    starts = {("attention", 0): 0, ("attention", 1): 7_000, ("expert", 0): 50_000, ("expert", 1): 0}  # of each clock
    events = np.array([[tr.ATTENTION, 100, 300, 0, 0, 0, 0, 0]], np.int64)
    traces = []
    for (role, rank), start_ns in starts.items():
        own = events.copy()
        own[:, 1:3] += start_ns
        traces.append(Trace(role, rank, own))
    ahead_ns = {0: {0: 50_000}, 1: {0: 43_000, 1: -7_000}}
    for each in tr.on_one_clock(traces, ahead_ns):
        assert each.events.tolist() == events.tolist(), (each.role, each.rank)
    assert tr.on_one_clock(traces, {0: {}, 1: {}}) == traces
