# SPDX-License-Identifier: Apache-2.0
"""What one rank does: attention ranks run their share of the prompts, expert ranks answer dispatches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import m2n

from .. import trace
from ..engine import schedule
from ..engine.attention import AttentionEngine
from ..engine.batching import Scheduler
from ..engine.layers import pass_through
from ..engine.remote import RemoteExperts
from ..engine.rounds import Repeated, RoundEngine
from ..engine.routes import RouteRecorder
from ..engine.schedule import expert_schedule, served_in_round
from ..model.checkpoint import Checkpoint, check
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.experts import ExpertWeights
from ..model.precision import FLOAT8, dispatch_bytes
from ..model.sequence import KVCache, Sequence
from ..run_config import ATTENTION, EXPERT, RunConfig
from ..trace import Tracer, make_tracer

Event = dict[str, Any]
Emit = Callable[[Event], None]
# What makes the comm of an attention rank, and of an expert rank.
Comms = tuple[Callable[..., Any], Callable[..., Any]]
# How often an expert rank without work looks whether every attention rank has left.
_IDLE_S = 0.05
_LONGEST_LINGER_US = 1e9  # that a verb takes


def load_decoder(directory: str | Path, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """The attention side's tensors and none of the experts'."""
    config, checkpoint = ModelConfig.from_directory(directory), Checkpoint(directory, device)
    return Decoder(config, checkpoint, check(checkpoint, config), dtype)


def load_experts(
    directory: str | Path, expert_ids: list[int], dtype: torch.dtype, device: str = "cpu"
) -> ExpertWeights:
    """The tensors of these experts and nothing else."""
    config, checkpoint = ModelConfig.from_directory(directory), Checkpoint(directory, device)
    return ExpertWeights(config, checkpoint, check(checkpoint, config), expert_ids, dtype)


def run_attention(
    comm: m2n.AttentionComm,
    run: RunConfig,
    decoder: Decoder,
    prompts: dict[int, list[int]],
    emit: Emit,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """Answer these prompts (by their number in the run); emits "tokens" per step and at the end "done".

    meet: called before anything is sent.
    """
    tracer = make_tracer(decoder.device)
    recorder = RouteRecorder(comm.rank, decoder.config.top_k) if run.record_routes else None
    experts = RemoteExperts(comm, run.timeout_s, is_launched=run.attention_device != "cpu")
    scheduler = Scheduler(run.max_batch, run.max_tokens, run.microbatches)
    common = (decoder, experts, scheduler, run.sampling, run.ignore_eos, recorder, tracer)
    engine: AttentionEngine
    if run.cuda_graphs:
        longest = max(map(len, prompts.values()), default=0) + run.max_new_tokens
        engine = RoundEngine(*common, num_positions=min(decoder.config.context, longest))
    else:
        engine = AttentionEngine(*common, sends_empty=run.is_lockstep and run.attention_ranks > 1)
    sequences = [Sequence(idx, token_ids, run.max_new_tokens) for idx, token_ids in prompts.items()]
    meet()
    for new_tokens in engine.run(sequences):
        emit({"event": "tokens", "tokens": [list(token) for token in new_tokens]})
    if recorder is not None:
        emit({"event": "routes", "routes": recorder.encode()})
    about = {"device": run.attention_device, "steps": engine.num_steps, "tokens": engine.num_tokens}
    _emit_end(comm, tracer, about, emit)


class _ExpertWorker:
    """Carries out expert_schedule."""

    def __init__(self, comm: m2n.ExpertComm, run: RunConfig, weights: ExpertWeights) -> None:
        self.comm, self.run, self.weights, self.tracer = comm, run, weights, make_tracer(weights.device)
        self.num_batches, self.num_pairs = 0, 0
        self.do: dict[str, Callable[[], Any]] = {
            schedule.RECEIVE: self._receive,
            schedule.EXPERT: self._expert,
            schedule.REPLY: self._reply,
        }
        # In strict lockstep: whom a batch must have; a rank that is done leaves it.
        is_strict = run.is_lockstep or run.cuda_graphs
        self.attention_ranks = list(range(run.attention_ranks)) if is_strict else None

    def serve(self, meet: Callable[[], object]) -> None:
        """Answer whichever (layer, microbatch) is ready, until every attention rank of the run has left."""
        meet()
        actions = expert_schedule()
        answer: tuple[int, int] | None = None
        with contextlib.suppress(StopIteration):
            while True:
                answer = self.do[actions.send(answer).kind]()

    def _receive(self) -> tuple[int, int] | None:
        at, batch = self.tracer.now(), self._next_batch(0.0)
        is_waited_for = batch is None
        while batch is None:
            if self._is_over():
                return None
            batch = self._next_batch(_IDLE_S)
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
            return self.comm.dispatch_recv(linger_us=self.run.linger_us, timeout=timeout_s)
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
        return list(self._last_states().values()).count("left") >= self.run.attention_ranks

    def _last_states(self) -> dict[int, str]:
        """By attention rank, of its newest life."""
        return {peer.rank: peer.state for peer in self.comm.peers()}

    def _expert(self) -> None:
        batch, began = self.batch, self.tracer.now()
        if self.run.expert_device == "cpu" and self.run.dispatch_dtype != FLOAT8:
            # The rows are read where they landed: each expert gathers its own by index.
            offsets = batch.expert_offsets.tolist()
            self.y_PH = self.weights.outputs(batch.layer, batch.x, offsets, batch.row_index_by_expert)
        elif self.weights.can_group:
            # One launch gathers for all experts; rows of float8 get their scales on the way.
            self.y_PH = self.weights.outputs_at(batch.layer, batch.gather(), batch.expert_offsets)
        else:
            self.y_PH = self.weights.outputs(batch.layer, batch.gather(), batch.expert_offsets.tolist())
        self.tracer.add(trace.EXPERT, began, *self.place)

    def _reply(self) -> None:
        began = self.tracer.now()
        num_rows = self.batch.num_rows if self.run.reduce_at == "expert" else self.batch.num_pairs
        self.comm.combine_send(self.batch, self.y_PH)
        num_bytes = num_rows * self.y_PH.shape[1] * self.y_PH.element_size()
        self.tracer.add(trace.COMBINE_SEND, began, *self.place, num_bytes)


class _RoundWorker(_ExpertWorker):
    """The other side of a RoundEngine: the batches of a round in its order, in a CUDA graph."""

    def serve(self, meet: Callable[[], object]) -> None:
        served, device = served_in_round(self.weights.config.moe_layers, self.run.microbatches), self.weights.device
        num_pairs = torch.zeros(1, dtype=torch.int64, device=device)
        # A launched receive waits for whoever has dispatched before and is live, however long: after a round with all
        # of them it needs no list, which would have to change when one leaves.
        linger_us = min(1e6 * self.run.timeout_s, _LONGEST_LINGER_US)

        def launch() -> None:
            for layer, microbatch in served:
                batch = self.comm.dispatch_recv(layer, microbatch, linger_us=linger_us, sync=False)
                assert batch is not None
                num_pairs.add_(batch.counts[2])
                self.comm.combine_send(batch, self.weights.outputs_at(layer, batch.gather(), batch.expert_offsets))

        repeat = Repeated(launch, device)
        meet()
        for _ in served:
            if self._receive() is not None:
                self._expert()
                self._reply()
        while served and self._has_work():
            began = self.tracer.now()
            repeat()
            self.num_batches += len(served)
            self.tracer.add(trace.ROUND, began, -1, -1, -1)
        self.num_pairs += int(num_pairs)

    def _has_work(self) -> bool:
        while self.comm.wait_work(_IDLE_S) is None:
            if self._is_over():
                return False
        return True


def run_expert(
    comm: m2n.ExpertComm,
    run: RunConfig,
    weights: ExpertWeights,
    emit: Emit,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """Answer what attention ranks send, until every one of the run has left. meet: called before any wait."""
    worker = (_RoundWorker if run.cuda_graphs else _ExpertWorker)(comm, run, weights)
    worker.serve(meet)
    about = {"device": run.expert_device, "batches": worker.num_batches, "pairs": worker.num_pairs}
    _emit_end(comm, worker.tracer, about, emit)


def _emit_end(comm: Any, tracer: Tracer, about: dict[str, Any], emit: Emit) -> None:
    counters = comm.stats()
    moved = {name: int(counters[name]) for name in ("bytes_sent", "bytes_received", "signals_held")}
    times = {"busy_s": tracer.seconds(trace.COMPUTING + trace.COMMUNICATING), "wait_s": tracer.seconds((trace.WAIT,))}
    clocks = {rank: round(1e9 * ahead_s) for rank, (ahead_s, _) in comm.clock_offsets().items()}
    emit({"event": "trace", "trace": tracer.encode(), "clocks": clocks})
    about["threads"] = torch.get_num_threads()
    emit({"event": "done", "stats": {**times, **about, **moved, "held_us": counters["held_us"]}})


def load_rank(run: RunConfig, role: str, rank: int) -> Decoder | ExpertWeights:
    """The tensors that a rank of this run needs."""
    loaded: Decoder | ExpertWeights
    device = run.torch_device(role)
    if role == ATTENTION:
        loaded = load_decoder(run.checkpoint, run.torch_dtype, device)
    else:
        placement = run.placement(ModelConfig.from_directory(run.checkpoint))
        loaded = load_experts(run.checkpoint, list(placement.experts_of(rank)), run.torch_dtype, device)
    return loaded


def settle() -> None:
    """All that is there now stays. To look through it for garbage takes a tenth of a second, in the middle of a step.

    Called while no rank of the process has a comm: what is there now and becomes garbage is never collected.
    """
    gc.collect()
    gc.freeze()


def _warm_up(loaded: Decoder | ExpertWeights, run: RunConfig) -> None:
    """Compute with every number of rows once, for nothing. A matrix product may need another kernel for each; to load
    one waits for kernels that run, so also for a kernel that waits for what this rank has to compute."""
    if isinstance(loaded, Decoder):
        _warm_up_decoder(loaded, run)
    elif any(loaded.config.moe_layers):
        _warm_up_experts(loaded, run)


def _warm_up_decoder(decoder: Decoder, run: RunConfig) -> None:
    config = decoder.config
    layers = sorted({config.moe_layers.index(kind) for kind in config.moe_layers})  # one of each kind
    most = min(run.max_tokens, config.context)
    cache = KVCache.allocate(config, most, decoder.dtype, decoder.device)
    # Page-locked memory for what goes to the device at the begin of a step, kept by torch from then on.
    sizes = [2**power for power in range((3 * most).bit_length() + 1)]
    _ = [torch.empty(size, dtype=torch.int64, pin_memory=True) for size in sizes for _ in range(6 * run.microbatches)]
    for num_tokens in range(1, most + 1):
        batch = decoder.begin([Sequence(0, [0] * num_tokens, num_scheduled=num_tokens, cache=cache)])
        batch.last_B = batch.last_B.expand(min(num_tokens, run.max_batch))
        pass_through(decoder, batch, layers).argmax(dim=-1).tolist()


def _warm_up_experts(weights: ExpertWeights, run: RunConfig) -> None:
    config, num_experts = weights.config, len(weights.expert_ids)
    layer, most_rows = config.moe_layers.index(True), run.max_peers(EXPERT) * run.max_tokens
    num_pairs = most_rows * min(config.top_k, num_experts)
    x_PH = torch.zeros((num_pairs, config.hidden), dtype=weights.dtype, device=weights.device)
    if run.cuda_graphs or weights.can_group:
        offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=weights.device)
        weights.outputs_at(layer, x_PH, offsets)
    if not weights.can_group:
        for num_rows in range(1, min(run.attention_ranks * run.max_tokens, most_rows) + 1):
            weights.run(layer, 0, x_PH[:num_rows])
        weights.outputs(layer, x_PH, [0] * num_experts + [num_pairs])


@contextlib.contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """On a GPU each rank has a stream of its own, whose work has ended when the rank ends."""
    if device == "cpu":
        yield
        return
    # cuDNN's attention compiles a plan for each new number of positions, some 10 to 100 ms each on an H100, and to load
    # it waits for kernels that run.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.current_stream(device).synchronize()


def run_rank(
    run: RunConfig,
    role: str,
    rank: int,
    prompts: dict[int, list[int]],
    store: Any,
    emit: Emit,
    loaded: Decoder | ExpertWeights | None = None,
    comms: Comms = (m2n.AttentionComm, m2n.ExpertComm),
    meet: Callable[[], object] = lambda: None,
) -> None:
    """Load what this rank needs (unless it is `loaded`), connect, work, say goodbye. Emits "ready" once connected.

    Args:
        comms: others with the same verbs, for comparison.
        meet: called between loading and connecting, and again before anything is sent or awaited: where ranks are
            threads it waits for all of them.
    """
    torch.set_num_threads(run.num_threads(role))
    with _own_stream(run.torch_device(role)):
        loaded = loaded or load_rank(run, role, rank)
        if run.torch_device(role) != "cpu":
            _warm_up(loaded, run)
        meet()
        options: dict[str, Any] = {
            "rank": rank,
            "shape": run.shape(loaded.config),
            "placement": run.placement(loaded.config),
            "store": store,
            "max_peers": run.max_peers(role),
            "config": run.comm_config,
            **({} if run.device(role) == "cpu" else {"device": run.device(role)}),
        }
        with comms[role == EXPERT](**options) as comm:
            emit({"event": "ready"})
            if isinstance(loaded, Decoder):
                run_attention(comm, run, loaded, prompts, emit, meet)
            else:
                run_expert(comm, run, loaded, emit, meet)
