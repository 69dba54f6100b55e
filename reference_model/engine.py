# SPDX-License-Identifier: Apache-2.0
"""AttentionEngine: the loop of an attention side, the same for experts in this process and on other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .experts import Experts
from .model import Decoder, KVCache, Microbatch, Span
from .routes import RouteRecorder
from .sampling import Sampler, SamplingConfig
from .schedule import ATTEND, COMBINE, ping_pong
from .scheduler import Piece, Scheduler, Sequence


class NewToken(NamedTuple):
    """A token that a step has drawn for a sequence; finish is None, "stop" (an end token) or "length"."""

    sequence_idx: int
    token_id: int
    finish: str | None


class AttentionEngine:
    """Runs sequences to their end; `step` is one pass of every running sequence through all layers."""

    def __init__(
        self,
        decoder: Decoder,
        experts: Experts,
        scheduler: Scheduler,
        sampling: SamplingConfig,
        ignore_eos: bool = False,
        recorder: RouteRecorder | None = None,
    ) -> None:
        self.decoder, self.experts, self.scheduler, self.sampling = decoder, experts, scheduler, sampling
        self.ignore_eos, self.recorder = ignore_eos, recorder
        self.num_steps, self.num_tokens = 0, 0

    def run(self, sequences: Iterable[Sequence]) -> Iterator[list[NewToken]]:
        """Yield the new tokens of each step until every sequence has left."""
        self.scheduler.add(sequences)
        while self.scheduler.has_work:
            yield self.step()

    def step(self) -> list[NewToken]:
        """Admit, compute one step, draw tokens, let finished sequences leave."""
        for sequence in self.scheduler.admit():
            self._prepare(sequence)
        plan = {idx: pieces for idx, pieces in enumerate(self.scheduler.plan()) if pieces}
        batches = {idx: self.decoder.begin([_span(piece) for piece in pieces]) for idx, pieces in plan.items()}
        self._run_layers(plan, batches)
        new_tokens = [token for idx, pieces in plan.items() for token in self._draw(pieces, batches[idx])]
        self.num_steps += 1
        return new_tokens

    def _prepare(self, sequence: Sequence) -> None:
        num_positions = min(self.decoder.config.context, len(sequence.prompt_ids) + sequence.max_new_tokens)
        sequence.cache = KVCache(self.decoder.config, num_positions, self.decoder.dtype)
        sequence.sampler = Sampler(self.sampling, sequence.idx)

    def _run_layers(self, plan: dict[int, list[Piece]], batches: dict[int, Microbatch]) -> None:
        moe_layers = self.decoder.config.moe_layers
        schedule = ping_pong(self.num_steps, moe_layers, list(batches))
        action = next(schedule, None)
        while action is not None:
            ready: int | None = None
            if action.kind == ATTEND:
                self._attend(action.layer, action.microbatch, plan, batches[action.microbatch])
            elif action.kind == COMBINE:
                self.decoder.finish(batches[action.microbatch], self.experts.combine(action.microbatch))
            else:
                ready = self.experts.ready(action.waiting)
                if ready is None:
                    ready = self.experts.wait_ready(action.waiting)
            try:
                action = schedule.send(ready)
            except StopIteration:
                action = None

    def _attend(self, layer: int, microbatch: int, plan: dict[int, list[Piece]], batch: Microbatch) -> None:
        self.decoder.attend(layer, batch)
        if not self.decoder.config.moe_layers[layer]:
            self.decoder.finish(batch, self.decoder.dense_ffn(layer, batch))
            return
        ids_TK, weights_TK = self.decoder.route(layer, batch)
        self.experts.dispatch(batch.expert_in_TH, ids_TK, weights_TK, layer, microbatch)
        if self.recorder is not None:
            self.recorder.record(self.num_steps, layer, microbatch, plan[microbatch], ids_TK, weights_TK)

    def _draw(self, pieces: list[Piece], batch: Microbatch) -> list[NewToken]:
        drawn: list[NewToken] = []
        completed = [piece.sequence for piece in pieces if piece.completes]
        self.num_tokens += batch.num_tokens
        for piece in pieces:
            piece.sequence.num_computed += piece.num_tokens
        if not completed:
            return drawn
        for sequence, logits_V in zip(completed, self.decoder.logits(batch)):
            assert sequence.sampler is not None
            token_id = sequence.sampler.next_token(logits_V)
            sequence.output_ids.append(token_id)
            finish = self._finish(sequence, token_id)
            if finish is not None:
                self.scheduler.leave(sequence)
            drawn.append(NewToken(sequence.idx, token_id, finish))
        return drawn

    def _finish(self, sequence: Sequence, token_id: int) -> str | None:
        if not self.ignore_eos and token_id in self.decoder.config.eos_token_ids:
            return "stop"
        is_full = len(sequence.token_ids) >= self.decoder.config.context
        return "length" if is_full or len(sequence.output_ids) >= sequence.max_new_tokens else None


def _span(piece: Piece) -> Span:
    sequence, start = piece.sequence, piece.sequence.num_computed
    assert sequence.cache is not None
    token_ids = sequence.token_ids[start : start + piece.num_tokens]
    return Span(sequence.cache, token_ids, start, piece.completes)
