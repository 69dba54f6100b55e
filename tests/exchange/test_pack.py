# SPDX-License-Identifier: Apache-2.0
"""`route(pack=True)`: the same bits, x free when dispatch_send returns, copies counted, refused on a device."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
import torch
from bodies import ONE, SMALL, small_answer, small_attention, small_expert
from oracle import FLOAT8, as_numpy, of_dtype

import m2n
from m2n import testing
from m2n.ranks import run_ranks

# More rows for a rank than a message over TCP has pieces (256), and more bytes than UCX sends before the receiver asks
# for them (512 KB).
SHAPE = m2n.Shape(
    hidden=520, num_experts=8, top_k=2, max_tokens=700, microbatches=2, dispatch_dtype="float32",
    combine_dtype="float32",
)  # fmt: skip
NETWORKS = ("tcp", *(pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "ucx-put")))
every_transport = pytest.mark.parametrize("transport", ("shm", *NETWORKS), indirect=True)
over_networks = pytest.mark.parametrize("transport", NETWORKS, indirect=True)


def strided(x: np.ndarray) -> np.ndarray:
    """The same rows, a row and some elements apart."""
    wide = np.full((2 * len(x), x.shape[1] + 24), 7, x.dtype)
    wide[::2, 8:-16] = x
    return wide[::2, 8:-16]


def exchange(
    comm: m2n.AttentionComm, workloads: list[testing.Workload], pack: bool
) -> tuple[list[Any], list[int], dict[str, float]]:
    """Two microbatches in flight; results, rows of each layer, and the counters."""
    results, num_rows = [], []
    for layer, workload in enumerate(workloads):
        if layer >= 2:
            results.append(comm.combine_recv(layer % 2))
        x = strided(as_numpy(workload.x))
        route = comm.route(workload.topk_ids.numpy(), workload.topk_weights.numpy(), pack=pack)
        comm.dispatch_send(x, route, layer % 2, layer)
        num_rows.append(route.num_rows)
        if pack:
            x.view(np.uint8)[:] = 0xFF  # NaN: it is the caller's again
    results += [comm.combine_recv(layer % 2) for layer in range(len(workloads) - 2, len(workloads))]
    return results, num_rows, comm.stats()


def check(transport: str, shape: m2n.Shape, pack: bool, num_experts: int = 2) -> None:
    placement = m2n.Placement.block(8, num_experts)
    kinds = ("uniform", "padded", "zero_tokens", "skewed", "one_expert")
    workloads = [testing.make_workload(shape, kind, seed) for seed, kind in enumerate(kinds)]

    def attention(comm: m2n.AttentionComm) -> Any:
        return exchange(comm, workloads, pack)

    def expert(comm: m2n.ExpertComm) -> int:
        return bodies.answer(comm, 1)

    results, num_rows, stats = run_ranks((attention, expert), 1, num_experts, shape=shape, config=bodies.NUMPY)[
        "attention", 0
    ]
    for layer, workload in enumerate(workloads):
        expected = as_numpy(testing.oracle_combine(workload, shape, placement))
        assert np.array_equal(results[layer], expected), f"layer {layer} differs from the oracle"
    is_copied = pack and transport != "shm" and shape.dispatch_dtype != FLOAT8
    row_bytes = shape.hidden * (2 if shape.dispatch_dtype == "bfloat16" else 4)
    assert stats["bytes_packed"] == (sum(num_rows) * row_bytes if is_copied else 0)
    assert stats["rows_sent"] == sum(num_rows)


@every_transport
@pytest.mark.parametrize("pack", [False, True])
def test_rows_that_lie_apart_equal_the_oracle(transport: str, pack: bool) -> None:
    check(transport, SHAPE, pack)


@every_transport
@pytest.mark.parametrize("dtype", ["bfloat16", FLOAT8])
def test_other_dtypes_too(transport: str, dtype: str) -> None:
    """Rows that become float8 are made where a packed row would lie: x is free, and nothing more is copied."""
    check(transport, of_dtype(dataclasses.replace(SHAPE, hidden=136, reduce_at="attention"), dtype), pack=True)


@over_networks
def test_small_messages_and_many_rounds_of_one_slot(transport: str) -> None:
    """The memory of a slot is written again only when nothing reads the last message from it."""
    shape = m2n.Shape(96, 4, 2, 40, 1, dispatch_dtype="float32", combine_dtype="float32")
    generator = np.random.default_rng(3)
    ids = np.stack([generator.permutation(4)[:2] for _ in range(40)]).astype(np.int64)
    weights = np.full(ids.shape, 0.5, np.float32)

    def attention(comm: m2n.AttentionComm) -> None:
        route = None
        for layer in range(200):
            num_tokens = 1 + layer * 7 % 40
            x = np.full((num_tokens, 96), layer, np.float32)
            route = comm.route(ids, weights, num_tokens, out=route, pack=layer % 3 != 0)
            comm.dispatch_send(x, route, layer=layer)
            if layer % 3 != 0:
                x[:] = np.nan
            given = (torch.full((num_tokens, 96), float(layer)), ids[:num_tokens], weights[:num_tokens])
            workload = testing.Workload(*map(torch.as_tensor, given))
            expected = testing.oracle_combine(workload, shape, comm.placement).numpy()
            assert np.array_equal(comm.combine_recv(), expected)

    run_ranks((attention, lambda comm: bodies.answer(comm, 1)), 1, 2, shape=shape, config=bodies.NUMPY)


@every_transport
def test_x_is_borrowed_only_where_it_is_not_packed(transport: str, tmp_path: Path) -> None:
    ids, weights = np.array([[0, 1]] * 8), np.full((8, 2), 0.5, np.float32)
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        for pack in (False, True):
            x = torch.ones(8, 64)
            seen = weakref.ref(x)
            route = comm.route(ids, weights, pack=pack)
            comm.dispatch_send(x, route)
            del x
            gc.collect()
            assert (seen() is None) == pack
            with pytest.raises(ValueError, match="in flight"):  # the route is needed until the rows are summed
                comm.route(ids, weights, out=route)
            assert small_answer(server)
            y = comm.combine_recv()
            assert isinstance(y, torch.Tensor) and y.shape == (8, 64)  # of the library that x came from
            assert seen() is None


def test_a_device_has_nothing_to_pack(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shape": SMALL, "placement": ONE, "store": tmp_path, "device": "emulated"}
    ids, weights = np.array([[0, 1]] * 8), np.full((8, 2), 0.5, np.float32)
    with m2n.ExpertComm(0, **options), m2n.AttentionComm(0, **options) as comm:
        with pytest.raises(ValueError, match="pack: the kernels of device 'emulated' write each row where it belongs"):
            comm.route(ids, weights, pack=True)
        assert comm.route(ids, weights).num_rows == 8 and comm.stats()["bytes_packed"] == 0
