# SPDX-License-Identifier: Apache-2.0
"""Steps in rounds, for ranks on devices: all microbatches take a step together, in one order of layers and microbatches
that both sides know, so that a round of decode steps can be recorded in a CUDA graph on each side and repeated.

While the experts have one microbatch of a layer, the stream of an attention rank computes the others (round_schedule).
Every microbatch takes part in every round, with no tokens where it has no sequence.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .. import trace
from ..model.decoder import Microbatch
from ..model.sequence import KVCache, Sequence
from .attention import AttentionEngine, NewToken
from .decode import CachePool, DecodeBatch
from .expert import IDLE_S, ExpertEngine
from .layers import Layers, pass_through
from .remote import RemoteExperts
from .schedule import END, Action, carry_out, expert_schedule, round_schedule, served_in_round

# torch waits for the whole device before it records, which fails while another thread is recording.
_RECORDING = threading.Lock()
_LONGEST_LINGER_US = 1e9  # that a verb takes


class Repeated:
    """Launches that are the same each time: on a GPU recorded in a CUDA graph, which a call replays; elsewhere each
    call makes them.

    To be made before any rank of the process has a kernel that waits: recording may wait for those that run. What is
    launched must have been computed once on this stream, so that nothing has to be loaded.
    """

    def __init__(self, launch: Callable[[], None], device: str) -> None:
        self._run: Callable[[], Any] = launch
        if device.startswith("cuda"):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # Other ranks may be threads of this process, which record theirs.
            with _RECORDING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                launch()
            self._run = graph.replay

    def __call__(self) -> None:
        self._run()


class RoundEngine(AttentionEngine):
    """An AttentionEngine whose microbatches take their steps together.

    Args:
        experts: launched ones.
        num_positions: of the longest sequence, its answer included.
        The rest as for AttentionEngine. Made before any rank of the process sends something (see Repeated).
    """

    def __init__(self, *args: Any, num_positions: int, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self.experts, RemoteExperts) and self.experts.is_launched
        self.remote, self.moe_layers = self.experts, self.decoder.config.moe_layers
        self.num_microbatches, max_batch = self.scheduler.num_microbatches, self.scheduler.max_batch
        num_places = min(-(-max_batch // self.num_microbatches), self.scheduler.max_tokens)
        self.pool = CachePool(self.decoder, max_batch, num_positions)
        microbatches = range(self.num_microbatches)
        self.decode = [DecodeBatch.allocate(self.decoder, self.pool, num_places) for _ in microbatches]
        for batch in self.decode:  # all that will be computed, but for what the experts answer
            batch.begin(self.decoder)
            pass_through(self.decoder, batch)
        for batch in self.decode:
            batch.route = self.remote.make_route(num_places, self.decoder.device)
        self._decode_layers = Layers(self.decoder, self.remote)
        self._decode_layers.microbatches.update(enumerate(self.decode))
        self._repeat_decode = Repeated(self._launch_decode, self.decoder.device)

    def run(self, sequences: Iterable[Sequence]) -> Iterator[list[NewToken]]:
        """Yield the new tokens of each step of a microbatch, until every sequence has left."""
        self.scheduler.add(sequences)
        step = 0
        while self.scheduler.has_work:
            self._admit()
            scheduled = [self.scheduler.begin(microbatch) for microbatch in range(self.num_microbatches)]
            if all(each.num_scheduled == 1 and each.completes for sequences in scheduled for each in sequences):
                began = self.tracer.now()
                self._decode_round(scheduled)
                self.tracer.add(trace.ROUND, began, step, -1, -1)
            else:
                self._mixed_round(step, scheduled)
            for microbatch in range(self.num_microbatches):
                new_tokens = self._end(Action(END, step, microbatch=microbatch))
                if new_tokens:
                    yield new_tokens
            step += 1

    def _mixed_round(self, step: int, scheduled: list[list[Sequence]]) -> None:
        """With prompts among them, whose length differs each time."""
        for microbatch, sequences in enumerate(scheduled):
            began = self.tracer.now()
            self.layers.microbatches[microbatch] = self.decoder.begin(sequences)
            self.tracer.add(trace.EMBED, began, step, -1, microbatch)
        self.layers.run(round_schedule(self.moe_layers, self.num_microbatches, step))

    def _decode_round(self, scheduled: list[list[Sequence]]) -> None:
        for microbatch, (batch, sequences) in enumerate(zip(self.decode, scheduled)):
            batch.fill(sequences)
            self.layers.microbatches[microbatch] = batch
        self._repeat_decode()

    def _launch_decode(self) -> None:
        for batch in self.decode:
            batch.begin(self.decoder)
        self._decode_layers.run(round_schedule(self.moe_layers, self.num_microbatches))
        for batch in self.decode:
            batch.logits_BV = self.decoder.logits(batch)

    def _logits(self, batch: Microbatch) -> torch.Tensor:
        if isinstance(batch, DecodeBatch):
            return batch.logits_BV[: len(batch.sequences)]
        return super()._logits(batch)

    def _make_cache(self, num_positions: int) -> KVCache:
        return self.pool.take()

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        self.pool.give_back(sequence.cache)
        super()._leave(sequence)


class RoundExpertEngine(ExpertEngine):
    """The other side of a RoundEngine: the batches of a round in its order. Made before any rank sends something, too.

    timeout_s: how long a receive waits for an attention rank that is live.
    """

    def __init__(self, *args: Any, timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.served = served_in_round(self.weights.config.moe_layers, self.comm.shape.microbatches)
        # A launched receive waits for whoever has dispatched before and is live, however long: after a round with all
        # of them it needs no list, which would have to change when one leaves.
        self.timeout_us = min(1e6 * timeout_s, _LONGEST_LINGER_US)
        self.num_repeated_pairs = torch.zeros(1, dtype=torch.int64, device=self.weights.device)
        self._repeat_round = Repeated(self._launch_round, self.weights.device)

    def _launch_round(self) -> None:
        for layer, microbatch in self.served:
            batch = self.comm.dispatch_recv(layer, microbatch, linger_us=self.timeout_us, sync=False)
            assert batch is not None
            self.num_repeated_pairs.add_(batch.counts[2])
            self.comm.combine_send(batch, self.weights.outputs_at(layer, batch.gather(), batch.expert_offsets))

    def run(self) -> None:
        """The first round with all attention ranks, batch by batch, then rounds in one, until all have left."""
        for _ in itertools.islice(carry_out(expert_schedule(), self.do), 3 * len(self.served)):
            pass
        while self.served and self._has_work():
            began = self.tracer.now()
            self._repeat_round()
            self.num_batches += len(self.served)
            self.tracer.add(trace.ROUND, began, -1, -1, -1)
        self.num_pairs += int(self.num_repeated_pairs)

    def _has_work(self) -> bool:
        while self.comm.wait_work(IDLE_S) is None:
            if self._is_over():
                return False
        return True
