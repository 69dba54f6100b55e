# SPDX-License-Identifier: Apache-2.0
"""Scheduler: which tokens of which sequences a microbatch of an attention rank computes in its next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..model.decoder import KVCache
from ..model.sampling import Sampler


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

    Sequences enter and leave between the steps of a microbatch, whatever the other microbatches are doing: a sequence
    is in one step at a time, and belongs to no microbatch in between.
    """

    def __init__(self, max_batch: int, max_tokens: int, num_microbatches: int) -> None:
        self.max_batch, self.max_tokens, self.num_microbatches = max_batch, max_tokens, num_microbatches
        self.waiting: deque[Sequence] = deque()
        self.between: deque[Sequence] = deque()  # at work, and in no step just now; longest ago first
        self.in_step: dict[int, list[Piece]] = {}  # by microbatch

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    @property
    def num_running(self) -> int:
        return len(self.between) + sum(len(pieces) for pieces in self.in_step.values())

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

    def begin(self, microbatch: int) -> list[Piece]:
        """The pieces of the microbatch's next step: its share of the sequences, at most max_tokens tokens.

        Sequences that produce a token now come first, so that a long prompt delays nobody's next token by more than
        its piece; prompts fill what is left. Nothing where there is nothing to do.
        """
        num_free = self.num_microbatches - len(self.in_step)  # this one among them
        share = min(-(-len(self.between) // num_free), -(-self.num_running // self.num_microbatches))
        chosen = sorted((self.between.popleft() for _ in range(share)), key=lambda sequence: sequence.num_pending > 1)
        pieces: list[Piece] = []
        room = self.max_tokens
        while chosen and room:
            pieces.append(Piece(chosen[0], min(chosen[0].num_pending, room)))
            room -= pieces[-1].num_tokens
            del chosen[0]
        self.between.extendleft(reversed(chosen))
        if pieces:
            self.in_step[microbatch] = pieces
        return pieces

    def end(self, microbatch: int) -> None:
        """The step of this microbatch is over."""
        self.between.extend(piece.sequence for piece in self.in_step.pop(microbatch, ()))

    def leave(self, sequence: Sequence) -> None:
        """A sequence is complete; its step must have ended."""
        self.between.remove(sequence)
        sequence.cache = None
