# SPDX-License-Identifier: Apache-2.0
"""Scheduler: which tokens of which sequences an attention rank computes in its next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .model import KVCache
from .sampling import Sampler


@dataclass
class Sequence:
    """One prompt and its answer; num_computed tokens of both have their keys and values in the cache."""

    idx: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampler: Sampler | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    cache: KVCache | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be computed: the rest of the prompt, or the newest token."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed


@dataclass(frozen=True)
class Piece:
    """num_tokens of a sequence from its first token without keys and values on."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Does this piece reach the sequence's last token, so that the next one can be drawn?"""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Continuous batching: at most max_batch sequences are at work, the others wait in order.

    Sequences enter and leave between steps.
    """

    def __init__(self, max_batch: int, max_tokens: int, num_microbatches: int) -> None:
        self.max_batch, self.max_tokens, self.num_microbatches = max_batch, max_tokens, num_microbatches
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Sequence]:
        """Let waiting sequences enter while there is room; return those that entered."""
        entered: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_batch:
            entered.append(self.waiting.popleft())
            self.running.append(entered[-1])
        return entered

    def leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.cache = None

    def plan(self) -> list[list[Piece]]:
        """Split the running sequences into microbatches of about equal tokens, at most max_tokens each.

        Sequences that produce a token now come first, so that a long prompt delays nobody's next token by
        more than its piece; prompts fill what is left. A microbatch may be empty.
        """
        pieces: list[list[Piece]] = [[] for _ in range(self.num_microbatches)]
        num_tokens = [0] * self.num_microbatches
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_pending > 1):
            lightest = min(range(self.num_microbatches), key=num_tokens.__getitem__)
            fitting = min(sequence.num_pending, self.max_tokens - num_tokens[lightest])
            if fitting:
                pieces[lightest].append(Piece(sequence, fitting))
                num_tokens[lightest] += fitting
        return pieces
