# SPDX-License-Identifier: Apache-2.0
"""What one rank does: attention ranks run their share of the prompts, expert ranks answer dispatches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import m2n

from .checkpoint import Checkpoint, check
from .config import ModelConfig
from .engine import AttentionEngine
from .experts import ExpertWeights, RemoteExperts
from .model import Decoder
from .routes import RouteRecorder
from .run_config import ATTENTION, EXPERT, RunConfig
from .scheduler import Scheduler, Sequence

Event = dict[str, Any]
Emit = Callable[[Event], None]
# How often an expert rank without work looks whether every attention rank has left.
_IDLE_S = 0.05


def load_decoder(directory: str | Path, dtype: torch.dtype) -> Decoder:
    """The attention side's tensors and none of the experts'."""
    config, checkpoint = ModelConfig.from_directory(directory), Checkpoint(directory)
    return Decoder(config, checkpoint, check(checkpoint, config), dtype)


def load_experts(directory: str | Path, expert_ids: list[int], dtype: torch.dtype) -> ExpertWeights:
    """The tensors of these experts and nothing else."""
    config, checkpoint = ModelConfig.from_directory(directory), Checkpoint(directory)
    return ExpertWeights(config, checkpoint, check(checkpoint, config), expert_ids, dtype)


def run_attention(
    comm: m2n.AttentionComm, run: RunConfig, decoder: Decoder, prompts: dict[int, list[int]], emit: Emit
) -> None:
    """Answer these prompts (by their number in the run); emits "tokens" per step and at the end "done"."""
    experts = RemoteExperts(comm, run.timeout_s)
    recorder = RouteRecorder(comm.rank, decoder.config.top_k) if run.record_routes else None
    scheduler = Scheduler(run.max_batch, run.max_tokens, run.microbatches)
    engine = AttentionEngine(decoder, experts, scheduler, run.sampling, run.ignore_eos, recorder)
    sequences = [Sequence(idx, token_ids, run.max_new_tokens) for idx, token_ids in prompts.items()]
    started = time.perf_counter()
    for new_tokens in engine.run(sequences):
        if new_tokens:
            emit({"event": "tokens", "tokens": [list(token) for token in new_tokens]})
    total_s = time.perf_counter() - started
    if recorder is not None:
        emit({"event": "routes", "routes": recorder.encode()})
    counts = {"steps": engine.num_steps, "tokens": engine.num_tokens}
    emit({"event": "done", "stats": _stats(comm, total_s - experts.wait_s, experts.wait_s, counts)})


def run_expert(comm: m2n.ExpertComm, run: RunConfig, weights: ExpertWeights, emit: Emit) -> None:
    """Answer whichever (layer, microbatch) is ready, until every attention rank of the run has left."""
    busy_s = wait_s = 0.0
    num_batches = num_pairs = 0
    while True:
        started = time.perf_counter()
        batch = comm.dispatch_recv(timeout=_IDLE_S)
        received = time.perf_counter()
        if batch is None:
            if _all_left(comm, run.attention_ranks):
                break
            wait_s += received - started
            continue
        wait_s += received - started
        num_batches, num_pairs = num_batches + 1, num_pairs + batch.num_pairs
        # The rows are read where they landed: each expert gathers its own by index.
        offsets = batch.expert_offsets.tolist()
        comm.combine_send(batch, weights.outputs(batch.layer, batch.x, batch.row_index_by_expert, offsets))
        busy_s += time.perf_counter() - received
    counts = {"batches": num_batches, "pairs": num_pairs}
    emit({"event": "done", "stats": _stats(comm, busy_s, wait_s, counts)})


def _all_left(comm: m2n.ExpertComm, num_attention_ranks: int) -> bool:
    return sum(peer.state == "left" for peer in comm.peers()) >= num_attention_ranks


def _stats(comm: Any, busy_s: float, wait_s: float, counts: dict[str, int]) -> dict[str, Any]:
    counters = comm.stats()
    moved = {name: int(counters[name]) for name in ("bytes_sent", "bytes_received")}
    return {"busy_s": busy_s, "wait_s": wait_s, **counts, **moved}


def run_rank(run: RunConfig, role: str, rank: int, prompts: dict[int, list[int]], store: Any, emit: Emit) -> None:
    """Load what this rank needs, connect, work, say goodbye. Emits "ready" once connected."""
    torch.set_num_threads(run.num_threads)
    config = ModelConfig.from_directory(run.checkpoint)
    placement = run.placement(config)
    comm_config = m2n.Config(job=run.job, timeout_s=run.timeout_s, connect_timeout_s=run.connect_timeout_s)
    # A place for every rank of the other side, and for as many that replace one.
    max_peers = 2 * (run.expert_ranks if role == ATTENTION else run.attention_ranks)
    options: dict[str, Any] = {
        "rank": rank,
        "shape": run.shape(config),
        "placement": placement,
        "store": store,
        "max_peers": max_peers,
        "config": comm_config,
    }
    if role == EXPERT:
        weights = load_experts(run.checkpoint, list(placement.experts_of(rank)), run.torch_dtype)
        with m2n.ExpertComm(**options) as expert_comm:
            emit({"event": "ready"})
            run_expert(expert_comm, run, weights, emit)
        return
    decoder = load_decoder(run.checkpoint, run.torch_dtype)
    with m2n.AttentionComm(**options) as attention_comm:
        emit({"event": "ready"})
        run_attention(attention_comm, run, decoder, prompts, emit)
