# SPDX-License-Identifier: Apache-2.0
"""What the processes of `m2n-bench pingpong` do: one rank of a run, the parts of a layer alone, or all in one."""

from __future__ import annotations

import time
from typing import Any

import torch

import m2n
from m2n.reference_model import trace
from m2n.reference_model.engine.attention import AttentionEngine
from m2n.reference_model.engine.batching import Scheduler
from m2n.reference_model.model.decoder import Decoder
from m2n.reference_model.model.experts import EchoExperts, ExpertWeights, LocalExperts
from m2n.reference_model.model.sampling import SamplingConfig
from m2n.reference_model.model.sequence import Sequence
from m2n.reference_model.run.rank import Comms, load_rank, run_rank, settle
from m2n.reference_model.run_config import ATTENTION, EXPERT, RunConfig
from m2n.reference_model.trace import Tracer

Kept = dict[Any, Any]


def prompts_of(run: RunConfig) -> list[list[int]]:
    """One token each, so that the first step is like all others."""
    num_prompts = run.max_batch * run.attention_ranks
    return [[1 + idx % 200] for idx in range(num_prompts)]


def _loaded(kept: Kept, run: RunConfig, role: str, rank: int) -> Decoder | ExpertWeights:
    key = (run.checkpoint, role, rank, run.expert_ranks)
    if key not in kept:
        kept.clear()
        kept[key] = load_rank(run, role, rank)
        settle()
    loaded: Decoder | ExpertWeights = kept[key]
    return loaded


def run_one_rank(
    kept: Kept,
    run: RunConfig,
    role: str,
    rank: int,
    store: str,
    comms: Comms = (m2n.AttentionComm, m2n.ExpertComm),
) -> list[dict[str, Any]]:
    """One rank of a run; returns its events."""
    events: list[dict[str, Any]] = []
    prompts = prompts_of(run)
    share = {idx: prompts[idx] for idx in run.share(rank, len(prompts))} if role == ATTENTION else {}

    def emit(event: dict[str, Any]) -> None:
        events.append({**event, "role": role, "rank": rank})

    run_rank(run, role, rank, share, store, emit, _loaded(kept, run, role, rank), comms)
    return events


class _SleepingExperts(EchoExperts):
    """Experts on no rank, which answer after so many seconds of sleep."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s

    def ready(self, microbatches: Any) -> int | None:
        is_waited_for = self.pause_s > 0 and microbatches[0] in self._answers
        return None if is_waited_for else int(microbatches[0])

    def wait_ready(self, microbatches: Any) -> int:
        time.sleep(self.pause_s)
        return int(microbatches[0])


def time_attention(kept: Kept, run: RunConfig, seconds: float, pause_s: float) -> tuple[list[float], list[float]]:
    """The attention side alone, one microbatch of run.max_batch sequences, for at least so long.

    pause_s: it sleeps so long after each layer, as a rank does while the experts compute.

    Returns (T_a of each layer, the time between the last layer of a step and the first of the next), in seconds.
    """
    decoder = _loaded(kept, run, ATTENTION, 0)
    assert isinstance(decoder, Decoder)
    t_a: list[float] = []
    t_step: list[float] = []
    until = time.monotonic() + seconds
    while not t_a or time.monotonic() < until:
        tracer = Tracer()
        scheduler = Scheduler(run.max_batch, run.max_tokens, 1)
        engine = AttentionEngine(decoder, _SleepingExperts(pause_s), scheduler, SamplingConfig(), True, tracer=tracer)
        for _ in engine.run(Sequence(idx, ids, run.max_new_tokens) for idx, ids in enumerate(prompts_of(run))):
            pass
        parts = _sums(tracer, (trace.ATTENTION, trace.ROUTE, trace.DISPATCH_SEND, trace.COMBINE_RECV))
        t_a += [total for (_, layer), total in parts.items() if layer >= 0]
        t_step += _sums(tracer, (trace.EMBED, trace.SAMPLE)).values()
    return t_a, t_step


def _sums(tracer: Tracer, kinds: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """Seconds in events of these kinds by (step, layer)."""
    sums: dict[tuple[int, int], float] = {}
    traced = trace.Trace.decode(ATTENTION, 0, tracer.encode())
    for kind, begin_ns, end_ns, step, layer, *_ in traced.events.tolist():
        if kind in kinds and step > 0:  # the first step warms up
            sums[step, layer] = sums.get((step, layer), 0.0) + (end_ns - begin_ns) / 1e9
    return sums


def time_experts(kept: Kept, run: RunConfig, seconds: float, pause_s: float) -> list[float]:
    """The expert side alone, on batches of run.max_batch tokens with random routes; T_e of each, in seconds.

    pause_s: it sleeps so long before each.
    """
    weights = _loaded(kept, run, EXPERT, 0)
    assert isinstance(weights, ExpertWeights)
    config, generator = weights.config, torch.Generator().manual_seed(0)
    batches = []
    for _ in range(16):
        ids_TK = torch.rand(run.max_batch, config.num_experts, generator=generator).topk(config.top_k).indices
        rows = [torch.where(ids_TK == expert)[0].to(torch.int32) for expert in weights.expert_ids]
        offsets = [0, *torch.tensor([len(each) for each in rows]).cumsum(0).tolist()]
        batches.append((torch.randn(run.max_batch, config.hidden, generator=generator), torch.cat(rows), offsets))
    times: list[float] = []
    until = time.monotonic() + seconds
    while len(times) < 32 or time.monotonic() < until:
        for number, (x_RH, rows_P, offsets) in enumerate(batches):
            if pause_s:
                time.sleep(pause_s)
            began = time.perf_counter()
            weights.outputs(number % config.num_layers, x_RH, offsets, rows_P)
            times.append(time.perf_counter() - began)
    return times[16:]


def run_monolithic(kept: Kept, run: RunConfig, rank: int) -> list[dict[str, Any]]:
    """Attention and all experts in this process, one microbatch; the events, as of an attention rank."""
    one = RunConfig(checkpoint=run.checkpoint)
    key = (run.checkpoint, "monolithic")
    if key not in kept:
        kept.clear()
        kept[key] = (load_rank(one, ATTENTION, 0), load_rank(one, EXPERT, 0))
        settle()
    decoder, weights = kept[key]
    tracer, prompts, events = Tracer(), prompts_of(run), []
    scheduler = Scheduler(run.max_batch, run.max_tokens, 1)
    engine = AttentionEngine(decoder, LocalExperts(weights), scheduler, SamplingConfig(), True, tracer=tracer)
    share = run.share(rank, len(prompts))
    for new_tokens in engine.run(Sequence(idx, prompts[idx], run.max_new_tokens) for idx in share):
        events.append({"event": "tokens", "tokens": [list(token) for token in new_tokens]})
    events.append({"event": "trace", "trace": tracer.encode()})
    return [{**event, "role": ATTENTION, "rank": rank} for event in events]
