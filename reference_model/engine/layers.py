# SPDX-License-Identifier: Apache-2.0
"""Layers: what is done for a schedule's actions on layers, in steps of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import trace
from ..model.decoder import Decoder, Microbatch
from ..model.experts import EchoExperts, Experts
from ..trace import Tracer
from .routes import RouteRecorder
from .schedule import ATTEND, COMBINE, DISPATCH, Action, Schedule, carry_out, walk


class Layers:
    """Does ATTEND, DISPATCH and COMBINE for the microbatches that are in a step.

    tracer: None keeps nothing, as of what a CUDA graph records.
    """

    def __init__(
        self, decoder: Decoder, experts: Experts, tracer: Tracer | None = None, recorder: RouteRecorder | None = None
    ) -> None:
        self.decoder, self.experts, self.recorder = decoder, experts, recorder
        self.tracer = tracer or Tracer(max_events=0)
        self.microbatches: dict[int, Microbatch] = {}
        self.do: dict[str, Callable[[Action], None]] = {
            ATTEND: self._attend,
            DISPATCH: self._dispatch,
            COMBINE: self._combine,
        }

    def run(self, schedule: Schedule) -> None:
        """A schedule of nothing but layers."""
        for _ in carry_out(schedule, self.do):
            pass

    def step(self, batch: Microbatch, layers: Sequence[int] | None = None) -> torch.Tensor:
        """A step of one microbatch alone, or these layers of it: its logits, float32 [B, V]."""
        self.microbatches[0] = batch
        self.run(walk(self.decoder.config.moe_layers, layers=layers))
        return self.decoder.logits(self.microbatches.pop(0))

    def _attend(self, action: Action) -> None:
        batch, place = self.microbatches[action.microbatch], (action.step, action.layer, action.microbatch)
        at = self.tracer.now()
        self.decoder.attend(action.layer, batch)
        if batch.num_tokens:
            at = self.tracer.add(trace.ATTENTION, at, *place)
        if not self.decoder.config.moe_layers[action.layer]:
            self.decoder.finish(batch, self.decoder.dense_ffn(action.layer, batch))
            self.tracer.add(trace.DENSE, at, *place)
            return
        ids_TK, weights_TK = self.decoder.route(action.layer, batch)
        batch.route = self.experts.route(ids_TK, weights_TK, **batch.route_options)
        if self.recorder is not None and batch.sequences:
            self.recorder.record(*place, batch.sequences, ids_TK, weights_TK)
        self.tracer.add(trace.ROUTE, at, *place)

    def _dispatch(self, action: Action) -> None:
        batch, began = self.microbatches[action.microbatch], self.tracer.now()
        num_bytes, batch.reply_bytes = self.experts.dispatch(
            batch.expert_in_TH, batch.route, action.layer, action.microbatch
        )
        self.tracer.add(trace.DISPATCH_SEND, began, action.step, action.layer, action.microbatch, num_bytes)

    def _combine(self, action: Action) -> None:
        batch, began = self.microbatches[action.microbatch], self.tracer.now()
        self.decoder.finish(batch, self.experts.combine(action.microbatch))
        self.tracer.add(trace.COMBINE_RECV, began, action.step, action.layer, action.microbatch, batch.reply_bytes)


def pass_through(decoder: Decoder, batch: Microbatch, layers: Sequence[int] | None = None) -> torch.Tensor:
    """The logits of a step, or of these layers of it, with experts that answer what they get."""
    return Layers(decoder, EchoExperts()).step(batch, layers)
