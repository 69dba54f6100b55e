# SPDX-License-Identifier: Apache-2.0
"""A ping-pong pipeline on a clock of its own: traces of a run whose T_a, T_e and T_c are known."""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from m2n.reference_model import trace as tr
from m2n.reference_model.trace import Trace

START_NS = 7_000_000
# An expert rank that waits looks up this often: a long wait is several events.
LOOK_UP_NS = 150_000

# A rank yields when it wants to go on, or None for the next message.
Rank = Generator["int | None", None, None]


@dataclass
class Toy:
    """The run; times in ns. Verbs are part of T_a and T_e: `verbs` of each, in two equal parts."""

    t_a: int = 400_000
    t_e: int = 400_000
    t_c: int = 100_000
    microbatches: int = 2
    attention_ranks: int = 1
    expert_ranks: int = 1
    layers: int = 4
    steps: int = 4
    verbs: float = 0.2
    edge_ns: int = 1000  # embed, and sample
    jitter: float = 0.0  # each time is up to this much longer or shorter
    dense_layers: tuple[int, ...] = ()
    waits_for_all: bool = True  # an expert rank's batches hold every attention rank, or one each
    empty_ranks: tuple[int, ...] = ()  # attention ranks without tokens, in strict lockstep
    mask: int | None = None  # instead of the bits of a batch
    seed: int = 0
    _events: dict[tuple[str, int], list[tuple[int, ...]]] = field(default_factory=dict)

    def traces(self) -> list[Trace]:
        """Run it."""
        self._random = random.Random(self.seed)
        self.now = START_NS
        self._heap: list[tuple[int, int, tuple[str, int]]] = []
        self._num_pushed = 0
        attention = [("attention", rank) for rank in range(self.attention_ranks)]
        experts = [("expert", rank) for rank in range(self.expert_ranks)]
        self._inbox: dict[tuple[str, int], list[tuple[int, ...]]] = {name: [] for name in (*attention, *experts)}
        self._is_blocked = dict.fromkeys(self._inbox, False)
        self._events = {name: [] for name in self._inbox}
        ranks = {name: self._attention(name) for name in attention} | {name: self._expert(name) for name in experts}
        for name in ranks:
            self._push(self.now, name)
        while self._heap:
            self.now, _, name = heapq.heappop(self._heap)
            wants = next(ranks[name], -1)
            self._is_blocked[name] = wants is None
            if wants is None:
                coming = [message[0] for message in self._inbox[name] if message[0] > self.now]
                if coming:
                    self._wake(min(coming), name)
            elif wants >= 0:
                self._push(wants, name)
        return [
            Trace(role, rank, np.array(events, np.int64).reshape(-1, len(tr.FIELDS)))
            for (role, rank), events in self._events.items()
        ]

    def _push(self, at: int, name: tuple[str, int]) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (at, self._num_pushed, name))

    def _wake(self, at: int, name: tuple[str, int]) -> None:
        if self._is_blocked[name]:
            self._is_blocked[name] = False
            self._push(max(at, self.now), name)

    def _post(self, name: tuple[str, int], *message: int) -> None:
        arrival = self.now + self.t_c
        self._inbox[name].append((arrival, *message))
        self._wake(arrival, name)

    def _arrived(self, name: tuple[str, int]) -> list[tuple[int, ...]]:
        return [message for message in self._inbox[name] if message[0] <= self.now]

    def _work(self, name: tuple[str, int], kind: int, time_ns: float, *about: int) -> Rank:
        begin = self.now
        yield begin + round(time_ns * (1 + self.jitter * self._random.uniform(-1, 1)))
        self._note(name, kind, begin, *about)

    def _note(self, name: tuple[str, int], kind: int, begin: int, *about: int) -> None:
        step, layer, microbatch, num_bytes, ranks = (*about, *(-1, -1, -1, 0, 0)[len(about) :])
        self._events[name].append((kind, begin, self.now, step, layer, microbatch, num_bytes, ranks))

    def _attention(self, name: tuple[str, int]) -> Rank:
        """Each microbatch goes through its steps on its own; what came back is taken in the order it went out."""
        verb_ns = self.t_a * self.verbs / 2
        place = dict.fromkeys(range(self.microbatches), (0, 0))
        waiting: list[int] = []
        for b in range(self.microbatches):
            yield from self._go_on(name, b, place, waiting)
        while waiting:
            answers = [message[1] for message in self._arrived(name)]
            ready = next((b for b in waiting if answers.count(b) == self.expert_ranks), None)
            if ready is None:
                began = self.now
                while ready is None:
                    yield None
                    answers = [message[1] for message in self._arrived(name)]
                    ready = next((b for b in waiting if answers.count(b) == self.expert_ranks), None)
                self._note(name, tr.WAIT, began, -1, -1, ready)
            self._inbox[name] = [message for message in self._inbox[name] if message[1] != ready]
            waiting.remove(ready)
            yield from self._work(name, tr.COMBINE_RECV, verb_ns, *place[ready], ready, 64)
            step, layer = place[ready]
            place[ready] = (step, layer + 1)
            yield from self._go_on(name, ready, place, waiting)

    def _go_on(self, name: tuple[str, int], b: int, place: dict[int, tuple[int, int]], waiting: list[int]) -> Rank:
        """Attention until tokens have gone to the experts, or no step is left."""
        compute_ns, verb_ns = self.t_a * (1 - self.verbs), self.t_a * self.verbs / 2
        while place[b][0] < self.steps:
            step, layer = place[b]
            if layer == self.layers:
                yield from self._work(name, tr.SAMPLE, self.edge_ns, step, -1, b)
                place[b] = (step + 1, 0)
                continue
            if layer == 0:
                yield from self._work(name, tr.EMBED, self.edge_ns, step, -1, b)
            is_empty = name[1] in self.empty_ranks
            if not is_empty:
                yield from self._work(name, tr.ATTENTION, 0.75 * compute_ns, step, layer, b)
            if layer in self.dense_layers:
                yield from self._work(name, tr.DENSE, 5 * self.t_a, step, layer, b)
                place[b] = (step, layer + 1)
                continue
            yield from self._work(name, tr.ROUTE, 0 if is_empty else 0.25 * compute_ns, step, layer, b)
            yield from self._work(name, tr.DISPATCH_SEND, verb_ns, step, layer, b, 0 if is_empty else 64)
            for e in range(self.expert_ranks):
                self._post(("expert", e), b, layer, name[1])
            waiting.append(b)
            return

    def _expert(self, name: tuple[str, int]) -> Rank:
        num_wanted = self.attention_ranks if self.waits_for_all else 1
        while True:
            began = self.now
            while (batch := self._batch(name, num_wanted)) is None:
                yield None
            while self.now - began > LOOK_UP_NS:
                self._events[name].append((tr.WAIT, began, began + LOOK_UP_NS, -1, -1, -1, 0, 0))
                began += LOOK_UP_NS
            if self.now > began:
                self._note(name, tr.WAIT, began)
            self._inbox[name] = [message for message in self._inbox[name] if message not in batch]
            _, b, layer, _ = batch[0]
            ranks = sum(1 << rank for *_, rank in batch) if self.mask is None else self.mask
            about = (-1, layer, b, 64)
            verb_ns = self.t_e * self.verbs / 2
            yield from self._work(name, tr.DISPATCH_RECV, verb_ns, *about, ranks)
            yield from self._work(name, tr.EXPERT, self.t_e * (1 - self.verbs), *about)
            yield from self._work(name, tr.COMBINE_SEND, verb_ns, *about)
            for *_, rank in batch:
                self._post(("attention", rank), b)

    def _batch(self, name: tuple[str, int], num_wanted: int) -> list[tuple[int, ...]] | None:
        """The messages of the (layer, microbatch) that came first of those that are complete."""
        arrived = self._arrived(name)
        for _, b, layer, _ in arrived:
            of_batch = [message for message in arrived if message[1:3] == (b, layer)]
            if len(of_batch) >= num_wanted:
                return of_batch[:num_wanted]
        return None


def hand_made(role: str, rank: int, *events: tuple[int, ...]) -> Trace:
    """A trace of (kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, ranks), the last five optional."""
    full = [(*event, *(-1, -1, -1, 0, 0)[len(event) - 3 :]) for event in events]
    return Trace(role, rank, np.array(full, np.int64).reshape(-1, len(tr.FIELDS)))
