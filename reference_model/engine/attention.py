# SPDX-License-Identifier: Apache-2.0
"""AttentionEngine: the loop of an attention side, the same for experts in this process and on other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .. import trace
from ..model.decoder import Decoder, Microbatch
from ..model.experts import Experts
from ..model.sampling import Sampler, SamplingConfig, draw
from ..model.sequence import KVCache, Sequence
from ..trace import Tracer
from .batching import Scheduler
from .layers import Layers
from .routes import RouteRecorder
from .schedule import BEGIN, END, POLL, WAIT, Action, attention_schedule, carry_out


class NewToken(NamedTuple):
    """A token that a step has drawn for a sequence; finish is None, "stop" (an end token) or "length"."""

    sequence_idx: int
    token_id: int
    finish: str | None


class AttentionEngine:
    """Runs sequences to their end; carries out attention_schedule.

    Args:
        sends_empty: a microbatch without tokens goes through its layers all the same, with zero rows, as long as any
            sequence is at work: in strict lockstep the other attention ranks' microbatches wait for it.
    """

    def __init__(
        self,
        decoder: Decoder,
        experts: Experts,
        scheduler: Scheduler,
        sampling: SamplingConfig,
        ignore_eos: bool = False,
        recorder: RouteRecorder | None = None,
        tracer: Tracer | None = None,
        sends_empty: bool = False,
    ) -> None:
        self.decoder, self.experts, self.scheduler, self.sampling = decoder, experts, scheduler, sampling
        self.ignore_eos, self.sends_empty = ignore_eos, sends_empty
        self.tracer = tracer or Tracer()
        self.num_steps, self.num_tokens = 0, 0
        self.layers = Layers(decoder, experts, self.tracer, recorder)
        self._do: dict[str, Callable[[Action], Any]] = {
            **self.layers.do,
            BEGIN: self._begin,
            END: self._end,
            POLL: lambda action: self.experts.ready(action.waiting),
            WAIT: self._wait,
        }

    def run(self, sequences: Iterable[Sequence]) -> Iterator[list[NewToken]]:
        """Yield the new tokens of each step of a microbatch, until every sequence has left."""
        self.scheduler.add(sequences)
        schedule = attention_schedule(self.decoder.config.moe_layers, self.scheduler.num_microbatches)
        for action, new_tokens in carry_out(schedule, self._do):
            if action.kind == END:
                if new_tokens:
                    yield new_tokens
                if not self.scheduler.has_work:
                    # Not even to finish a microbatch without tokens: of two ranks that end, each might wait for the
                    # other one's.
                    return

    def _begin(self, action: Action) -> bool:
        """Admit sequences, and embed the tokens of the microbatch's share of those that are between steps."""
        began = self.tracer.now()
        self._admit()
        sequences = self.scheduler.begin(action.microbatch)
        if not sequences and not (self.sends_empty and self.scheduler.has_work):
            return False
        self.layers.microbatches[action.microbatch] = self.decoder.begin(sequences)
        self.tracer.add(trace.EMBED, began, action.step, -1, action.microbatch)
        return True

    def _admit(self) -> None:
        for sequence in self.scheduler.admit():
            num_positions = min(self.decoder.config.context, len(sequence.prompt_ids) + sequence.max_new_tokens)
            sequence.cache = self._make_cache(num_positions)
            sequence.sampler = Sampler(self.sampling, sequence.idx)

    def _make_cache(self, num_positions: int) -> KVCache:
        return KVCache.allocate(self.decoder.config, num_positions, self.decoder.dtype, self.decoder.device)

    def _wait(self, action: Action) -> int:
        ready = self.experts.ready(action.waiting)
        if ready is not None:
            return ready
        began = self.tracer.now()
        ready = self.experts.wait_ready(action.waiting)
        self.tracer.add(trace.WAIT, began, -1, -1, ready)
        return ready

    def _end(self, action: Action) -> list[NewToken]:
        """Draw tokens; finished sequences leave."""
        began = self.tracer.now()
        batch = self.layers.microbatches.pop(action.microbatch)
        self.scheduler.end(action.microbatch)
        completed = [sequence for sequence in batch.sequences if sequence.completes]
        samplers = [sequence.sampler for sequence in completed if sequence.sampler is not None]
        token_ids = draw(samplers, self._ruled(self._logits(batch), completed)) if completed else []
        self.experts.check()
        self.num_tokens += sum(sequence.num_scheduled for sequence in batch.sequences)
        for sequence in batch.sequences:
            sequence.advance()
        new_tokens: list[NewToken] = []
        for sequence, token_id in zip(completed, token_ids):
            sequence.output_ids.append(token_id)
            finish = self._finish(sequence, token_id)
            if finish is not None:
                self._leave(sequence)
            new_tokens.append(NewToken(sequence.idx, token_id, finish))
        self.num_steps += 1
        self.tracer.add(trace.SAMPLE, began, action.step, -1, action.microbatch)
        return new_tokens

    def _logits(self, batch: Microbatch) -> torch.Tensor:
        """After the last token of each sequence that completes."""
        return self.decoder.logits(batch)

    def _ruled(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """The logits after the rules of the checkpoint's generation config."""
        config = self.decoder.config
        if config.generation.changes_nothing:
            return logits_BV
        eos_token_ids = frozenset[int]() if self.ignore_eos else config.eos_token_ids
        rows = [
            config.generation.apply(logits_V, sequence.prompt_ids, sequence.output_ids, eos_token_ids)
            for logits_V, sequence in zip(logits_BV, sequences)
        ]
        return torch.stack(rows)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.leave(sequence)

    def _finish(self, sequence: Sequence, token_id: int) -> str | None:
        if not self.ignore_eos and token_id in self.decoder.config.eos_token_ids:
            return "stop"
        is_full = len(sequence.token_ids) >= self.decoder.config.context
        return "length" if is_full or len(sequence.output_ids) >= sequence.max_new_tokens else None
