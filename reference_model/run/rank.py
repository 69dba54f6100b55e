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
from ..engine.attention import AttentionEngine
from ..engine.batching import Scheduler
from ..engine.expert import ExpertEngine
from ..engine.layers import pass_through
from ..engine.remote import RemoteExperts
from ..engine.rounds import RoundEngine, RoundExpertEngine
from ..engine.routes import RouteRecorder
from ..model.checkpoint import Checkpoint, check
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.experts import ExpertWeights
from ..model.sequence import KVCache, Sequence
from ..run_config import ATTENTION, EXPERT, RunConfig
from ..trace import Tracer, make_tracer

Event = dict[str, Any]
Emit = Callable[[Event], None]
# What makes the comm of an attention rank, and of an expert rank.
Comms = tuple[Callable[..., Any], Callable[..., Any]]


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


def run_expert(
    comm: m2n.ExpertComm,
    run: RunConfig,
    weights: ExpertWeights,
    emit: Emit,
    meet: Callable[[], object] = lambda: None,
) -> None:
    """Answer what attention ranks send, until every one of the run has left. meet: called before any wait."""
    tracer, is_launched = make_tracer(weights.device), run.expert_device != "cpu"
    engine: ExpertEngine
    if run.cuda_graphs:
        common = (comm, weights, run.attention_ranks, None, is_launched, tracer)
        engine = RoundExpertEngine(*common, timeout_s=run.timeout_s)
    else:
        engine = ExpertEngine(comm, weights, run.attention_ranks, run.linger_us, is_launched, tracer)
    meet()
    engine.run()
    about = {"device": run.expert_device, "batches": engine.num_batches, "pairs": engine.num_pairs}
    _emit_end(comm, tracer, about, emit)


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
    device = run.torch_device(role)
    if role == ATTENTION:
        return load_decoder(run.checkpoint, run.torch_dtype, device)
    placement = run.placement(ModelConfig.from_directory(run.checkpoint))
    return load_experts(run.checkpoint, list(placement.experts_of(rank)), run.torch_dtype, device)


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
