# SPDX-License-Identifier: Apache-2.0
"""simulate: how long a ping-pong pipeline takes, from the times of its parts (MegaScale-Infer, section 4.1).

It carries out the schedules of the ranks (schedule.py) on a clock of its own. With one attention rank, one step and
constant times it gives the paper's equation 5 where the pipeline is full, (T_a + T_e + 2 T_c) + T_f (m L - 1), and
L (T_a + T_e + 2 T_c) + (m - 1) T_f where it is not; T_f = max(T_a, T_e).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine import schedule
from ..engine.schedule import LATER, Action, attention_schedule, carry_out, expert_schedule

Time = float | Sequence[float]  # a constant, or samples to draw from


@dataclass(frozen=True)
class Pipeline:
    """What is simulated; times in seconds.

    Args:
        layers: L, all with experts. microbatches: m. steps: tokens that every microbatch draws.
        t_a: attention of one layer of a microbatch. t_e: one batch of an expert rank with the tokens of all attention
            ranks; with those of k of M it takes k / M of that. t_c: one way, for a dispatch or a combine.
        t_step: between two steps of a microbatch, on its attention rank: the head, sampling, embedding.
        linger: as ExpertComm.dispatch_recv's linger_us, in seconds; None: strict lockstep.
        seed: of the draws, where times are samples.

    Raises:
        ValueError: naming the argument.
    """

    layers: int
    microbatches: int
    t_a: Time
    t_e: Time
    t_c: Time = 0.0
    t_step: Time = 0.0
    steps: int = 1
    attention_ranks: int = 1
    expert_ranks: int = 1
    linger: float | None = 50e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "microbatches", "steps", "attention_ranks", "expert_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("t_a", "t_e", "t_c", "t_step"):
            value = getattr(self, name)
            samples = [value] if isinstance(value, (int, float)) else list(value)
            if not samples or not all(0 <= sample < float("inf") for sample in samples):
                raise ValueError(f"{name}: expected seconds, or samples of them, got {value!r}")
        if self.linger is not None and not self.linger >= 0:
            raise ValueError(f"linger: expected seconds or None, got {self.linger!r}")


@dataclass
class Simulated:
    """What came out; seconds from the begin of the run."""

    total_s: float = 0.0
    # By (attention rank, microbatch): when each of its steps ended.
    step_ends_s: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    busy_s: dict[tuple[str, int], float] = field(default_factory=dict)  # by (role, rank)

    @property
    def steps_per_s(self) -> float:
        """Steps of microbatches, of all attention ranks, per second."""
        return sum(len(ends) for ends in self.step_ends_s.values()) / self.total_s

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they had nothing to do."""
        return 1 - sum(self.busy_s.values()) / (self.total_s * len(self.busy_s))


def simulate(pipeline: Pipeline) -> Simulated:
    """Run the pipeline to its end."""
    return _Simulation(pipeline).run()


class _Simulation:
    """The clock, and what happens when."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.now = pipeline, 0.0
        self.result = Simulated()
        self._draws = random.Random(pipeline.seed)
        self._numbers = itertools.count()  # what is due at one time happens in the order it was asked for
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.experts = [_Expert(self, rank) for rank in range(pipeline.expert_ranks)]
        self.attention = [_Attention(self, rank) for rank in range(pipeline.attention_ranks)]

    def run(self) -> Simulated:
        for worker in (*self.experts, *self.attention):
            worker.resume()
        while self._due:
            self.now, _, happen = heapq.heappop(self._due)
            happen()
        self.result.total_s = max(ends[-1] for ends in self.result.step_ends_s.values())
        return self.result

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), happen))

    def draw(self, time: Time) -> float:
        return float(time) if isinstance(time, (int, float)) else self._draws.choice(time)


class _Worker:
    """A rank: carries its schedule out until an action takes time, or has to wait for something."""

    role = ""

    def __init__(
        self, simulation: _Simulation, rank: int, actions: schedule.Schedule, do: Mapping[str, Callable[[Action], Any]]
    ) -> None:
        self.simulation, self.pipeline, self.rank = simulation, simulation.pipeline, rank
        self.actions = carry_out(actions, do)
        self.is_done = self.is_waiting = False
        self.seconds = 0.0  # that the action takes which was begun last
        simulation.result.busy_s[self.role, rank] = 0.0

    def resume(self) -> None:
        for _, answer in self.actions:
            seconds, self.seconds, self.is_waiting = self.seconds, 0.0, answer is LATER
            if seconds > 0:
                self.simulation.result.busy_s[self.role, self.rank] += seconds
                self.simulation.after(seconds, self.resume)
            if seconds > 0 or self.is_waiting:
                return
        self.is_done = True
        for expert in self.simulation.experts:  # nobody waits for this rank any longer
            expert.wake()

    def wake(self) -> None:
        """Something has come: what was waited for may be there."""
        if self.is_waiting:
            self.resume()


class _Attention(_Worker):
    role = "attention"

    def __init__(self, simulation: _Simulation, rank: int) -> None:
        pipeline = simulation.pipeline
        do: dict[str, Callable[[Action], Any]] = {
            schedule.BEGIN: self._begin,
            schedule.ATTEND: self._attend,
            schedule.DISPATCH: self._dispatch,
            schedule.COMBINE: lambda action: None,
            schedule.END: lambda action: self.step_ends[action.microbatch].append(simulation.now),
            schedule.POLL: self._ready,
            schedule.WAIT: lambda action: LATER if (ready := self._ready(action)) is None else ready,
        }
        super().__init__(simulation, rank, attention_schedule([True] * pipeline.layers, pipeline.microbatches), do)
        self.awaited = dict.fromkeys(range(pipeline.microbatches), 0)  # replies on their way
        self.step_ends = [simulation.result.step_ends_s.setdefault((rank, m), []) for m in self.awaited]

    def _begin(self, action: Action) -> bool:
        has_tokens = action.step < self.pipeline.steps
        if has_tokens and action.step:
            self.seconds = self.simulation.draw(self.pipeline.t_step)
        return has_tokens

    def _attend(self, action: Action) -> None:
        self.seconds = self.simulation.draw(self.pipeline.t_a)

    def _dispatch(self, action: Action) -> None:
        self.awaited[action.microbatch] = len(self.simulation.experts)
        for expert in self.simulation.experts:
            send = functools.partial(expert.arrive, self.rank, action.layer, action.microbatch)
            self.simulation.after(self.simulation.draw(self.pipeline.t_c), send)

    def _ready(self, action: Action) -> int | None:
        return next((waiting for waiting in action.waiting if not self.awaited[waiting]), None)

    def reply(self, microbatch: int) -> None:
        self.awaited[microbatch] -= 1
        if not self.awaited[microbatch]:
            self.wake()


class _Expert(_Worker):
    role = "expert"

    def __init__(self, simulation: _Simulation, rank: int) -> None:
        do = {schedule.RECEIVE: self._receive, schedule.EXPERT: self._expert, schedule.REPLY: self._reply}
        super().__init__(simulation, rank, expert_schedule(), do)
        self.pending: dict[tuple[int, int], dict[int, float]] = {}  # (layer, microbatch): when it came, by sender
        self.expected: set[tuple[int, int]] = set()  # (attention rank, microbatch): answered, and likely to send again
        self.batch: dict[int, float] = {}

    def arrive(self, attention_rank: int, layer: int, microbatch: int) -> None:
        self.expected.discard((attention_rank, microbatch))
        self.pending.setdefault((layer, microbatch), {})[attention_rank] = self.simulation.now
        self.wake()

    def _receive(self, action: Action) -> Any:
        complete = [work for work in self.pending if self._is_complete(work)]
        if not complete:
            if self.pending and self.pipeline.linger is not None:
                until = min(min(came.values()) for came in self.pending.values()) + self.pipeline.linger
                self.simulation.after(max(0.0, until - self.simulation.now), self.wake)
            return LATER
        work = min(complete, key=lambda work: min(self.pending[work].values()))
        self.batch = self.pending.pop(work)
        return work

    def _expert(self, action: Action) -> None:
        self.seconds = self.simulation.draw(self.pipeline.t_e) * len(self.batch) / self.pipeline.attention_ranks

    def _reply(self, action: Action) -> None:
        for rank in self.batch:
            self.expected.add((rank, action.microbatch))
            reply = functools.partial(self.simulation.attention[rank].reply, action.microbatch)
            self.simulation.after(self.simulation.draw(self.pipeline.t_c), reply)

    def _is_complete(self, work: tuple[int, int]) -> bool:
        """As in csrc/exchange/bodies/inbox.h: everybody who may still send this batch has, or has been waited for."""
        came, attention = self.pending[work], self.simulation.attention
        if self.pipeline.linger is None:
            return all(worker.rank in came or worker.is_done for worker in attention)
        is_anyone_missing = any((worker.rank, work[1]) in self.expected and not worker.is_done for worker in attention)
        return not is_anyone_missing or self.simulation.now >= min(came.values()) + self.pipeline.linger
