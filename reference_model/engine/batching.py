# SPDX-License-Identifier: Apache-2.0
"""Scheduler: which tokens of which sequences a microbatch of an attention rank computes in its next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..model.sequence import Sequence


class Scheduler:
    """Continuous batching: at most max_batch sequences are at work, the others wait in order.

    Sequences enter and leave between the steps of a microbatch, whatever the other microbatches are doing: a sequence
    is in one step at a time, and belongs to no microbatch in between.
    """

    def __init__(self, max_batch: int, max_tokens: int, num_microbatches: int) -> None:
        self.max_batch, self.max_tokens, self.num_microbatches = max_batch, max_tokens, num_microbatches
        self.waiting: deque[Sequence] = deque()
        self.between: deque[Sequence] = deque()  # at work, and in no step just now; longest ago first
        self.in_step: dict[int, list[Sequence]] = {}  # by microbatch

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    @property
    def num_running(self) -> int:
        return len(self.between) + sum(len(sequences) for sequences in self.in_step.values())

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.num_running)

    def admit(self) -> list[Sequence]:
        """Let waiting sequences enter while there is room; return those that entered."""
        entered: list[Sequence] = []
        while self.waiting and self.num_running < self.max_batch:
            entered.append(self.waiting.popleft())
            self.between.append(entered[-1])
        return entered

    def begin(self, microbatch: int) -> list[Sequence]:
        """The microbatch's next step: its share of the sequences, which schedule at most max_tokens tokens.

        Sequences that produce a token now come first, so that a long prompt delays nobody's next token by more than
        its share; prompts fill what is left. Nothing where there is nothing to do.
        """
        num_free = self.num_microbatches - len(self.in_step)  # this one among them
        share = min(-(-len(self.between) // num_free), -(-self.num_running // self.num_microbatches))
        chosen = sorted((self.between.popleft() for _ in range(share)), key=lambda sequence: sequence.num_pending > 1)
        scheduled: list[Sequence] = []
        room = self.max_tokens
        while len(scheduled) < len(chosen) and room:
            scheduled.append(chosen[len(scheduled)])
            scheduled[-1].num_scheduled = min(scheduled[-1].num_pending, room)
            room -= scheduled[-1].num_scheduled
        self.between.extendleft(reversed(chosen[len(scheduled) :]))
        if scheduled:
            self.in_step[microbatch] = scheduled
        return scheduled

    def end(self, microbatch: int) -> None:
        """The step of this microbatch is over."""
        self.between.extend(self.in_step.pop(microbatch, ()))

    def leave(self, sequence: Sequence) -> None:
        """A sequence is complete; its step must have ended."""
        self.between.remove(sequence)
        sequence.cache = None
