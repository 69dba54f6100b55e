# SPDX-License-Identifier: Apache-2.0
"""Workloads of every kind, exchanged by ranks of any kind, and held against the oracle bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bodies
import numpy as np
import pytest
import torch

import m2n
from m2n import testing
from m2n.ranks import run_ranks, serve

SHAPE = m2n.Shape(
    hidden=72, num_experts=8, top_k=3, max_tokens=17, microbatches=2, dispatch_dtype="float32", combine_dtype="float32"
)
FLOAT8 = "float8_e4m3fn"
# The host's own verbs, kernels on CPU threads, and kernels.
OWN_MEMORY = ("cpu", "emulated", pytest.param("cuda:0", marks=pytest.mark.cuda))
# Replicated experts, uneven ranks.
REPLICAS = m2n.Placement([[0], [0, 1], [2], [1, 2], [0, 1, 2], [2], [1], [0, 2]])


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def of_dtype(shape: m2n.Shape, dtype: str) -> m2n.Shape:
    """With rows of `dtype` both ways; replies to float8 are bfloat16."""
    return dataclasses.replace(shape, dispatch_dtype=dtype, combine_dtype="bfloat16" if dtype == FLOAT8 else dtype)


def to_numpy(workload: testing.Workload) -> testing.Workload:
    return testing.Workload(as_numpy(workload.x), workload.topk_ids.numpy(), workload.topk_weights.numpy())


def to_device(workload: testing.Workload, device: str) -> testing.Workload:
    if not device.startswith("cuda"):
        device = "cpu"
    return testing.Workload(*(getattr(workload, f.name).to(device) for f in dataclasses.fields(workload)))


def check(
    shape: m2n.Shape,
    placement: m2n.Placement,
    workloads: list[list[testing.Workload]],
    processes: bool = False,
    in_numpy: bool = False,
    device: str = "cpu",
    faults: m2n.Faults | None = None,
    **options: Any,
) -> None:
    """Runs the workloads [rank][layer] through the library and compares every result with the oracle."""
    place = to_numpy if in_numpy else functools.partial(to_device, device=device)
    given_workloads = [[place(w) for w in layers] for layers in workloads]
    is_network = device.startswith(("tcp", "ucx"))
    config = bodies.config_of(device) if is_network else bodies.NUMPY
    config = dataclasses.replace(config, arrays="numpy" if in_numpy else "torch", faults=faults)
    results = run_ranks(
        bodies.pair(given_workloads, **options),
        len(workloads),
        placement.num_expert_ranks,
        shape=shape,
        placement=placement,
        processes=processes,
        device="cpu" if is_network else device,
        config=config,
    )
    for rank, layers in enumerate(workloads):
        for layer, workload in enumerate(layers):
            expected = testing.oracle_combine(workload, shape, placement, rank)
            y = results["attention", rank][layer]
            y = torch.from_numpy(y.view(np.uint16) if y.dtype.name == "bfloat16" else y) if in_numpy else y
            y = y.view(torch.bfloat16) if y.dtype == torch.uint16 else y.cpu()
            assert torch.equal(y, expected), f"attention rank {rank}, layer {layer}: differs from the oracle"


def all_kinds(shape: m2n.Shape, num_ranks: int) -> list[list[testing.Workload]]:
    """Every kind of workload as a layer, at a different layer on each rank."""
    kinds = testing.KINDS
    return [
        [testing.make_workload(shape, kinds[(i + rank) % len(kinds)], 10 * i + rank) for i in range(len(kinds))]
        for rank in range(num_ranks)
    ]


def oracles(workloads: list[list[testing.Workload]], shape: m2n.Shape, placement: m2n.Placement) -> list[list[Any]]:
    return [
        [as_numpy(testing.oracle_combine(workload, shape, placement, rank)) for workload in layers]
        for rank, layers in enumerate(workloads)
    ]


def are_equal(results: list[Any], expected: list[Any]) -> bool:
    return len(results) == len(expected) and all(map(np.array_equal, results, expected))


def drive_and_serve(config: m2n.Config) -> None:
    """A thread for each microbatch of each of two attention ranks; three that receive on each of two expert ranks."""
    shape = dataclasses.replace(SHAPE, microbatches=4)
    placement = m2n.Placement.block(8, 2)
    given = [[testing.make_workload(shape, "uniform", 4 * rank + i) for i in range(4)] for rank in range(2)]
    expected = oracles(given, shape, placement)
    workloads = [list(map(to_numpy, layers)) for layers in given]

    def attend(comm: m2n.AttentionComm) -> None:
        def drive(microbatch: int) -> None:
            workload, y = workloads[comm.rank][microbatch], expected[comm.rank][microbatch]
            for layer in range(20):
                route = comm.route(workload.topk_ids, workload.topk_weights)
                comm.dispatch_send(workload.x, route, microbatch, layer)
                if layer % 3 == 0:
                    assert comm.wait_ready([microbatch]) == microbatch
                assert np.array_equal(comm.combine_recv(microbatch), y)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(drive, range(4)))

    def serve_all(comm: m2n.ExpertComm) -> int:
        experts = comm.placement.experts_of(comm.rank)

        def loop(_: int) -> int:
            return serve(comm, 2, lambda batch: testing.expert_outputs(batch, experts))

        with ThreadPoolExecutor(3) as pool:
            return sum(pool.map(loop, range(3)))

    results = run_ranks((attend, serve_all), 2, 2, shape=shape, placement=placement, config=config)
    for rank in range(2):  # a batch is one layer of one microbatch, from one attention rank or from both
        assert 80 <= results["expert", rank] <= 160


def run_one(attention: Any, expert: Any, shape: m2n.Shape = SHAPE, m: int = 1, n: int = 1) -> Any:
    """What m attention ranks and n expert ranks return, threads that run these."""
    config = dataclasses.replace(bodies.NUMPY, arrays="torch", timeout_s=10.0)
    return run_ranks((attention, expert), m, n, shape=shape, config=config, timeout=40)
