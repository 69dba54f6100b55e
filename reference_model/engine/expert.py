# SPDX-License-Identifier: Apache-2.0
"""ExpertEngine: the loop of an expert side, which answers what attention ranks send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import m2n

from .. import trace
from ..model.experts import ExpertWeights
from ..model.precision import FLOAT8, dispatch_bytes
from ..trace import Tracer
from .schedule import EXPERT, RECEIVE, REPLY, Action, carry_out, expert_schedule

# How often a rank without work looks whether every attention rank has left.
IDLE_S = 0.05


class ExpertEngine:
    """Carries out expert_schedule.

    Args:
        num_attention_ranks: of the run; it ends when so many have left.
        linger_us: how long a batch waits for more of them; None: for all that have not left, strict lockstep.
        is_launched: the verbs of `comm` are launches on a device.
    """

    def __init__(
        self,
        comm: m2n.ExpertComm,
        weights: ExpertWeights,
        num_attention_ranks: int,
        linger_us: float | None = None,
        is_launched: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self.comm, self.weights, self.num_attention_ranks = comm, weights, num_attention_ranks
        self.linger_us, self.tracer = linger_us, tracer or Tracer()
        self.num_batches, self.num_pairs = 0, 0
        # Rows are then read where they landed.
        self.is_read_in_place = not is_launched and comm.shape.dispatch_dtype != FLOAT8
        self.do: dict[str, Callable[[Action], Any]] = {
            RECEIVE: self._receive,
            EXPERT: self._expert,
            REPLY: self._reply,
        }
        # In strict lockstep: whom a batch must have; a rank that is done leaves it.
        self.attention_ranks = list(range(num_attention_ranks)) if linger_us is None else None

    def run(self) -> None:
        """Answer whichever (layer, microbatch) is ready, until every attention rank of the run has left."""
        for _ in carry_out(expert_schedule(), self.do):
            pass

    def _receive(self, action: Action) -> tuple[int, int] | None:
        at, batch = self.tracer.now(), self._next_batch(0.0)
        is_waited_for = batch is None
        while batch is None:
            if self._is_over():
                return None
            batch = self._next_batch(IDLE_S)
        self.batch, self.place = batch, (-1, batch.layer, batch.microbatch)
        if is_waited_for:
            at = self.tracer.add(trace.WAIT, at, *self.place)
        ranks = trace.ALL_RANKS if max(batch.peers) > 62 else sum(1 << rank for rank in batch.peers)
        num_bytes = batch.num_rows * dispatch_bytes(self.comm.shape)
        self.tracer.add(trace.DISPATCH_RECV, at, *self.place, num_bytes, ranks)
        self.num_batches, self.num_pairs = self.num_batches + 1, self.num_pairs + batch.num_pairs
        return batch.layer, batch.microbatch

    def _next_batch(self, timeout_s: float) -> m2n.Batch | None:
        if self.attention_ranks is None:
            return self.comm.dispatch_recv(linger_us=self.linger_us, timeout=timeout_s)
        try:
            return self.comm.dispatch_recv(linger_us=None, attention_ranks=self.attention_ranks, timeout=timeout_s)
        except m2n.PeerLost as lost:
            if lost.peer is None or self._last_states().get(lost.peer) != "left":
                raise
            self.attention_ranks.remove(lost.peer)
        except m2n.Timeout:  # of this look, not of the run: the others are still computing
            pass
        return None

    def _is_over(self) -> bool:
        return list(self._last_states().values()).count("left") >= self.num_attention_ranks

    def _last_states(self) -> dict[int, str]:
        """By attention rank, of its newest life."""
        return {peer.rank: peer.state for peer in self.comm.peers()}

    def _expert(self, action: Action) -> None:
        batch, began = self.batch, self.tracer.now()
        if self.is_read_in_place:
            # Each expert gathers its own by index.
            offsets = batch.expert_offsets.tolist()
            self.y_PH = self.weights.outputs(batch.layer, batch.x, offsets, batch.row_index_by_expert)
        elif self.weights.can_group:
            # One launch gathers for all experts; rows of float8 get their scales on the way.
            self.y_PH = self.weights.outputs_at(batch.layer, batch.gather(), batch.expert_offsets)
        else:
            self.y_PH = self.weights.outputs(batch.layer, batch.gather(), batch.expert_offsets.tolist())
        self.tracer.add(trace.EXPERT, began, *self.place)

    def _reply(self, action: Action) -> None:
        began = self.tracer.now()
        num_rows = self.batch.num_rows if self.comm.shape.reduce_at == "expert" else self.batch.num_pairs
        self.comm.combine_send(self.batch, self.y_PH)
        num_bytes = num_rows * self.y_PH.shape[1] * self.y_PH.element_size()
        self.tracer.add(trace.COMBINE_SEND, began, *self.place, num_bytes)
