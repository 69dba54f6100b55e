# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests: importable, so that it runs in spawned processes too. Needs numpy only."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import m2n
from m2n.ranks import serve
from m2n.testing import apply_expert, expert_outputs

NUMPY = m2n.Config(arrays="numpy", timeout_s=20.0, connect_timeout_s=20.0)


def exchange(comm: m2n.AttentionComm, workloads: list[list[Any]]) -> list[Any]:
    """Sends this rank's workloads, a layer each, with as many microbatches in flight as there are; their results."""
    results: list[Any] = []
    num_microbatches = comm.shape.microbatches
    for layer, workload in enumerate(workloads[comm.rank]):
        if layer >= num_microbatches:
            results.append(comm.combine_recv(layer % num_microbatches))
        route = comm.route(workload.topk_ids, workload.topk_weights)
        comm.dispatch_send(workload.x, route, microbatch=layer % num_microbatches, layer=layer)
    for layer in range(len(results), len(workloads[comm.rank])):
        results.append(comm.combine_recv(layer % num_microbatches))
    return results


def answer(comm: m2n.ExpertComm, attention: int, linger_us: float = 50) -> int:
    """Applies the stand-in experts until all attention ranks have left."""
    experts = comm.placement.experts_of(comm.rank)
    return serve(comm, attention, lambda batch: expert_outputs(batch, experts, apply_expert), linger_us)


def pair(workloads: list[list[Any]], **options: Any) -> tuple[Any, Any]:
    """(attention function, expert function) for run_ranks."""
    return (
        functools.partial(exchange, workloads=workloads),
        functools.partial(answer, attention=len(workloads), **options),
    )


def attention_main(rank: int, store: str, shape: m2n.Shape, placement: m2n.Placement, to_do: str) -> None:
    """An attention process of the fault tests."""
    import numpy as np

    with m2n.AttentionComm(rank, shape, placement, store, config=NUMPY) as comm:
        ids = np.tile(np.arange(shape.top_k, dtype=np.int32), (4, 1))
        weights = np.full(ids.shape, 0.5, np.float32)
        x = np.ones((4, shape.hidden), np.float32)
        comm.dispatch_send(x, comm.route(ids, weights))
        if to_do == "die":
            os.kill(os.getpid(), 9)
        if to_do == "hold":
            time.sleep(60)


def expert_main(rank: int, store: str, shape: m2n.Shape, placement: m2n.Placement, to_do: str) -> None:
    """An expert process of the fault tests."""
    with m2n.ExpertComm(rank, shape, placement, store, config=NUMPY) as comm:
        if to_do == "hold":
            time.sleep(60)
        batch = comm.dispatch_recv()
        if to_do == "die":
            os.kill(os.getpid(), 9)
        assert batch is not None
        comm.combine_send(batch, expert_outputs(batch, placement.experts_of(rank)))
        if to_do == "answer_and_die":
            os.kill(os.getpid(), 9)
