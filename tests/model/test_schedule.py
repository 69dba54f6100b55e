# SPDX-License-Identifier: Apache-2.0
"""The ping-pong schedules as data, the scheduler beneath them, and the simulator that runs them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from m2n.reference_model.engine.batching import Scheduler  # noqa: E402
from m2n.reference_model.engine.schedule import (
    ATTEND,
    BEGIN,
    COMBINE,
    DISPATCH,
    END,
    EXPERT,
    POLL,
    RECEIVE,
    REPLY,
    WAIT,
    Action,
    attention_schedule,
    expert_schedule,
)
from m2n.reference_model.model.sequence import Sequence  # noqa: E402
from m2n.reference_model.report.simulate import Pipeline, simulate  # noqa: E402

MAX_ACTIONS = 50_000


class Carrier:
    """Carries out an attention schedule: answers come in any order that `draw` likes, steps have any number of tokens.

    num_steps: for each microbatch how many steps it has; 0: it is empty, and so never begins. gains: microbatches that
    have one more step after their tokens had run out once (sequences of another microbatch, or a new request).
    """

    def __init__(
        self, moe_layers: tuple[bool, ...], num_steps: list[int], draw: Any, gains: tuple[int, ...] = ()
    ) -> None:
        self.moe_layers, self.num_steps, self.draw = moe_layers, list(num_steps), draw
        self.gains = list(gains)
        self.done: list[Action] = []
        self.in_step: set[int] = set()
        self.in_flight: set[int] = set()  # slots in use
        self.began: dict[int, int] = dict.fromkeys(range(len(num_steps)), 0)
        self.asked: set[int] = set()  # microbatches that said they have no tokens, since the last END

    def run(self) -> list[Action]:
        schedule = attention_schedule(self.moe_layers, len(self.num_steps))
        answer: Any = None
        for _ in range(MAX_ACTIONS):
            try:
                action = schedule.send(answer)
            except StopIteration:
                return self.done
            answer = getattr(self, f"on_{action.kind}")(action)
            if action.kind not in (POLL, WAIT) and answer is not False:  # a step that has no tokens does not begin
                self.done.append(action)
        raise AssertionError("the schedule does not end")

    def on_begin(self, action: Action) -> bool:
        microbatch = action.microbatch
        assert microbatch not in self.in_step and action.step == self.began[microbatch]
        if self.began[microbatch] == self.num_steps[microbatch]:
            self.asked.add(microbatch)
            return False
        self.began[microbatch] += 1
        self.in_step.add(microbatch)
        return True

    def on_attend(self, action: Action) -> None:
        assert action.microbatch in self.in_step and action.microbatch not in self.in_flight

    def on_dispatch_send(self, action: Action) -> None:
        assert action.microbatch not in self.in_flight, "a slot is used twice"
        self.in_flight.add(action.microbatch)

    def on_combine_recv(self, action: Action) -> None:
        self.in_flight.remove(action.microbatch)

    def on_end(self, action: Action) -> None:
        self.in_step.remove(action.microbatch)
        self.asked.clear()
        if self.gains:
            self.num_steps[self.gains.pop()] += 1

    def on_poll(self, action: Action) -> int | None:
        assert action.waiting and set(action.waiting) <= self.in_step
        return self.draw((None, *action.waiting))

    def on_wait(self, action: Action) -> int:
        # Never while another could be computed: all that are in a step wait, and no other has tokens.
        assert set(action.waiting) == self.in_step
        idle = set(self.began) - self.in_step
        assert all(self.began[microbatch] == self.num_steps[microbatch] for microbatch in idle) and idle <= self.asked
        return self.draw(action.waiting)


def of_one_step(moe_layers: tuple[bool, ...], step: int, microbatch: int) -> list[Action]:
    actions = [Action(BEGIN, step, 0, microbatch)]
    for layer, has_experts in enumerate(moe_layers):
        kinds = (ATTEND, DISPATCH, COMBINE) if has_experts else (ATTEND,)
        actions += [Action(kind, step, layer, microbatch) for kind in kinds]
    return [*actions, Action(END, step, len(moe_layers), microbatch)]


@settings(max_examples=150, deadline=None)
@given(
    moe_layers=st.lists(st.booleans(), min_size=1, max_size=4).map(tuple),
    num_steps=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_microbatch_passes_every_layer_once_and_in_order_whatever_arrives_first(
    moe_layers: tuple[bool, ...], num_steps: list[int], data: st.DataObject
) -> None:
    gains: tuple[int, ...] = ()
    if sum(num_steps):
        gains = tuple(data.draw(st.lists(st.integers(0, len(num_steps) - 1), max_size=min(3, sum(num_steps)))))
    carrier = Carrier(moe_layers, num_steps, lambda choices: data.draw(st.sampled_from(choices)), gains)
    done = carrier.run()
    assert not carrier.in_step and not carrier.in_flight
    assert carrier.began == dict(enumerate(carrier.num_steps)), "a step was left undone"
    for microbatch, count in carrier.began.items():
        expected = [action for step in range(count) for action in of_one_step(moe_layers, step, microbatch)]
        assert [action for action in done if action.microbatch == microbatch] == expected


def test_a_microbatch_begins_its_next_step_while_another_is_still_in_the_one_before() -> None:
    done = Carrier((True,) * 4, [3, 3], lambda choices: next(choice for choice in choices if choice is not None)).run()
    other_end = {step: done.index(Action(END, step, 4, 1)) for step in range(3)}
    overlapping = [a for i, a in enumerate(done) if a.microbatch == 0 and a.step > 0 and i < other_end[a.step - 1]]
    assert overlapping, "steps do not overlap"


def test_the_plain_schedule_of_two_microbatches_is_ping_pong() -> None:
    carrier = Carrier((True, True), [1, 1], lambda choices: choices[-1] if choices[0] is None else choices[0])
    actions = [(a.kind, a.layer, a.microbatch) for a in carrier.run() if a.kind in (ATTEND, DISPATCH, COMBINE)]
    assert actions == [
        (ATTEND, 0, 0), (DISPATCH, 0, 0), (ATTEND, 0, 1), (DISPATCH, 0, 1),
        (COMBINE, 0, 0), (ATTEND, 1, 0), (DISPATCH, 1, 0), (COMBINE, 0, 1), (ATTEND, 1, 1), (DISPATCH, 1, 1),
        (COMBINE, 1, 0), (COMBINE, 1, 1),
    ]  # fmt: skip


def test_an_expert_rank_receives_computes_and_replies_until_nobody_sends() -> None:
    schedule = expert_schedule()
    assert next(schedule) == Action(RECEIVE)
    assert schedule.send((3, 1)) == Action(EXPERT, layer=3, microbatch=1)
    assert schedule.send(None) == Action(REPLY, layer=3, microbatch=1)
    assert schedule.send(None) == Action(RECEIVE)
    with pytest.raises(StopIteration):
        schedule.send(None)


@pytest.mark.parametrize(
    ("moe_layers", "microbatches", "name"), [((), 1, "moe_layers"), ((True,), 0, "num_microbatches")]
)
def test_no_layers_and_no_microbatches_are_refused(moe_layers: tuple[bool, ...], microbatches: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        attention_schedule(moe_layers, microbatches)


# ---- the scheduler


def begin(scheduler: Scheduler, microbatch: int) -> list[tuple[int, int]]:
    return [(sequence.idx, sequence.num_scheduled) for sequence in scheduler.begin(microbatch)]


def test_the_scheduler_never_exceeds_its_limits_and_decodes_first() -> None:
    scheduler = Scheduler(max_batch=4, max_tokens=8, num_microbatches=2)
    scheduler.add(Sequence(idx, [0] * length, 4) for idx, length in enumerate((20, 1, 1, 30, 5)))
    assert [sequence.idx for sequence in scheduler.admit()] == [0, 1, 2, 3]
    assert len(scheduler.waiting) == 1
    assert begin(scheduler, 0) == [(1, 1), (0, 7)]
    assert begin(scheduler, 1) == [(2, 1), (3, 7)]
    assert [each.completes for sequences in scheduler.in_step.values() for each in sequences] == [
        True,
        False,
        True,
        False,
    ]
    assert not scheduler.admit()
    leaving, cut = scheduler.in_step[0]
    scheduler.end(0)
    cut.advance()
    scheduler.leave(leaving)
    assert [sequence.idx for sequence in scheduler.admit()] == [4]
    assert begin(scheduler, 0) == [(0, 8)], "what is left of a prompt goes on before a newer one"


def test_a_microbatch_that_ran_out_takes_its_share_of_the_others_sequences() -> None:
    scheduler = Scheduler(max_batch=8, max_tokens=8, num_microbatches=2)
    scheduler.add(Sequence(idx, [0], 4) for idx in range(4))
    scheduler.admit()
    assert [begin(scheduler, 0), begin(scheduler, 1)] == [[(0, 1), (1, 1)], [(2, 1), (3, 1)]]
    for sequence in list(scheduler.in_step[0]):
        if scheduler.in_step.get(0):
            scheduler.end(0)
        scheduler.leave(sequence)
    assert begin(scheduler, 0) == []
    scheduler.end(1)
    assert [begin(scheduler, 1), begin(scheduler, 0)] == [[(2, 1)], [(3, 1)]]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    microbatches=st.integers(1, 4),
    max_batch=st.integers(1, 6),
    max_tokens=st.integers(1, 12),
    data=st.data(),
)
def test_every_sequence_computes_every_token_once_and_leaves(
    lengths: list[int], microbatches: int, max_batch: int, max_tokens: int, data: st.DataObject
) -> None:
    num_new = 3
    scheduler = Scheduler(max_batch, max_tokens, microbatches)
    sequences = [Sequence(idx, [0] * length, num_new) for idx, length in enumerate(lengths)]
    scheduler.add(sequences)
    for _ in range(10_000):
        if not scheduler.has_work:
            break
        scheduler.admit()
        began = [b for b in range(microbatches) if b not in scheduler.in_step and scheduler.begin(b)]
        assert began or scheduler.in_step, "there is work, and nobody takes it"
        running = [sequence.idx for sequences in scheduler.in_step.values() for sequence in sequences]
        assert len(running) == len(set(running)) <= max_batch
        assert all(sum(each.num_scheduled for each in step) <= max_tokens for step in scheduler.in_step.values())
        ending = data.draw(st.sampled_from(sorted(scheduler.in_step)))
        in_step = scheduler.in_step[ending]
        scheduler.end(ending)
        for sequence in in_step:
            completes = sequence.completes
            sequence.advance()
            if completes:
                sequence.output_ids.append(0)
                if len(sequence.output_ids) == num_new:
                    scheduler.leave(sequence)
    assert not scheduler.has_work
    assert [sequence.num_computed for sequence in sequences] == [length + num_new - 1 for length in lengths]


# ---- the simulator

TIMES = st.integers(1, 50).map(float)


def closed_form(layers: int, microbatches: int, t_a: float, t_e: float, t_c: float) -> float:
    """Equation 5 of the paper, and its counterpart for a pipeline that is not full."""
    t_f, trip = max(t_a, t_e), t_a + t_e + 2 * t_c
    return max(trip + t_f * (microbatches * layers - 1), layers * trip + (microbatches - 1) * t_f)


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 8), microbatches=st.integers(1, 6), t_a=TIMES, t_e=TIMES, t_c=st.integers(0, 60).map(float)
)
def test_constant_times_give_equation_5_and_its_counterpart(
    layers: int, microbatches: int, t_a: float, t_e: float, t_c: float
) -> None:
    simulated = simulate(Pipeline(layers, microbatches, t_a, t_e, t_c))
    expected = closed_form(layers, microbatches, t_a, t_e, t_c)
    assert simulated.total_s == pytest.approx(expected)
    t_f, trip = max(t_a, t_e), t_a + t_e + 2 * t_c
    is_full = microbatches * t_f >= trip
    first_end = simulated.step_ends_s[0, 0][0]
    if is_full:  # equation 4, the latency of one microbatch
        assert trip + microbatches * t_f * (layers - 1) <= first_end + 1e-6
        assert first_end <= microbatches * t_f * layers + 1e-6
    assert simulated.bubble == pytest.approx(1 - microbatches * layers * (t_a + t_e) / (2 * expected))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.28, 0.38, 0.8])
def test_more_microbatches_gain_what_the_paper_says(ratio: float) -> None:
    rates = [simulate(Pipeline(8, m, 1.0, 1.0, ratio, steps=100)).steps_per_s for m in (1, 2, 3, 4)]
    assert rates[1] / rates[0] == pytest.approx(2, rel=0.02)
    assert rates[2] / rates[1] == pytest.approx(min(1 + ratio, 1.5), rel=0.02)
    if ratio <= 0.5:
        assert rates[3] / rates[2] == pytest.approx(1, rel=0.02)


def test_steps_overlap_in_the_simulator_too() -> None:
    one, many = (simulate(Pipeline(4, 3, 2.0, 2.0, 0.5, steps=steps)).total_s for steps in (1, 10))
    assert many == pytest.approx(closed_form(4 * 10, 3, 2.0, 2.0, 0.5))
    assert many < 10 * one


@pytest.mark.parametrize("linger", [0.0, 0.5, None])
def test_several_attention_ranks_share_batches_and_all_steps_end(linger: float | None) -> None:
    simulated = simulate(
        Pipeline(3, 2, [1.0, 1.5, 2.0], 1.0, [0.1, 0.4], 0.2, steps=5, attention_ranks=3, expert_ranks=2, linger=linger)
    )
    assert {place: len(ends) for place, ends in simulated.step_ends_s.items()} == {
        (rank, microbatch): 5 for rank in range(3) for microbatch in range(2)
    }
    assert 0 <= simulated.bubble < 1
    again = simulate(
        Pipeline(3, 2, [1.0, 1.5, 2.0], 1.0, [0.1, 0.4], 0.2, steps=5, attention_ranks=3, expert_ranks=2, linger=linger)
    )
    assert again.total_s == simulated.total_s, "the same seed gives the same run"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"layers": 0}, "layers"),
        ({"microbatches": 0}, "microbatches"),
        ({"t_a": -1.0}, "t_a"),
        ({"t_e": []}, "t_e"),
        ({"t_c": float("nan")}, "t_c"),
        ({"steps": 0}, "steps"),
        ({"linger": -1.0}, "linger"),
    ],
)
def test_times_and_counts_that_make_no_pipeline_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Pipeline(**{"layers": 1, "microbatches": 1, "t_a": 1.0, "t_e": 1.0, **options})
