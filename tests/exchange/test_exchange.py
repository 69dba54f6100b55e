# SPDX-License-Identifier: Apache-2.0
"""The conformance suite: every shape, workload and kind of rank, compared with the oracle bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FLOAT8, OWN_MEMORY, REPLICAS, SHAPE, all_kinds, check, of_dtype

import m2n
from m2n import testing

# UCX by messages and by puts.
NETWORKS = ("tcp", *(pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "ucx-put")))
DEVICES = (*OWN_MEMORY, *NETWORKS)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize("dtype", (*DTYPES, FLOAT8))
@pytest.mark.parametrize("device", DEVICES)
def test_every_workload_equals_the_oracle_bit_for_bit(device: str, dtype: str, reduce_at: str) -> None:
    shape = of_dtype(dataclasses.replace(SHAPE, reduce_at=reduce_at), dtype)
    check(shape, REPLICAS, all_kinds(shape, 2), device=device)


@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize(
    "x_dtype, combine_dtype, hidden",
    [
        ("float32", "bfloat16", 40),
        ("bfloat16", "float32", 200),
        ("float16", "float16", 256),
        ("bfloat16", "bfloat16", 1),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_any_type_become_float8_on_their_way(
    device: str, x_dtype: str, combine_dtype: str, hidden: int, reduce_at: str
) -> None:
    changes = {"hidden": hidden, "dispatch_dtype": FLOAT8, "combine_dtype": combine_dtype, "reduce_at": reduce_at}
    shape = dataclasses.replace(SHAPE, **changes)
    workloads = [
        [dataclasses.replace(w, x=w.x.to(getattr(torch, x_dtype))) for w in layers] for layers in all_kinds(shape, 2)
    ]
    check(shape, REPLICAS, workloads, device=device)


@pytest.mark.parametrize("dispatch_dtype, combine_dtype", [("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("device", DEVICES)
def test_directions_may_have_different_dtypes(device: str, dispatch_dtype: str, combine_dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dispatch_dtype=dispatch_dtype, combine_dtype=combine_dtype)
    check(shape, REPLICAS, all_kinds(shape, 2), device=device)


@pytest.mark.parametrize("m, n", [(1, 1), (3, 1), (1, 4), (3, 2), (2, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_any_number_of_ranks_on_either_side(device: str, m: int, n: int) -> None:
    check(SHAPE, m2n.Placement.block(8, n), all_kinds(SHAPE, m), device=device)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
@pytest.mark.parametrize("device", DEVICES)
def test_several_microbatches_in_flight(device: str, microbatches: int) -> None:
    shape = dataclasses.replace(SHAPE, microbatches=microbatches)
    check(shape, REPLICAS, all_kinds(shape, 2), device=device)


@pytest.mark.parametrize("dtype, reduce_at", [("bfloat16", "expert"), ("float32", "attention"), (FLOAT8, "expert")])
@pytest.mark.parametrize("device", ["cpu", *NETWORKS, "emulated"])
def test_ranks_as_processes(device: str, dtype: str, reduce_at: str) -> None:
    shape = of_dtype(dataclasses.replace(SHAPE, reduce_at=reduce_at), dtype)
    check(shape, REPLICAS, all_kinds(shape, 2), processes=True, in_numpy=True, device=device)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", (*DTYPES, FLOAT8))
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_numpy_in_numpy_out(device: str, dtype: str) -> None:
    shape = of_dtype(SHAPE, dtype)
    check(shape, REPLICAS, all_kinds(shape, 2), in_numpy=True, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_no_lingering_serves_each_message_alone_with_the_same_bits(device: str) -> None:
    check(SHAPE, REPLICAS, all_kinds(SHAPE, 3), linger_us=0, device=device)


def test_bits_do_not_depend_on_the_placement_when_attention_reduces() -> None:
    shape = dataclasses.replace(SHAPE, reduce_at="attention", combine_dtype="bfloat16")
    workload = testing.make_workload(shape, "skewed", 5)
    results = [
        testing.oracle_combine(workload, shape, placement)
        for placement in (m2n.Placement.block(8, 1), m2n.Placement.block(8, 5), REPLICAS)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    check(shape, m2n.Placement.block(8, 5), [[workload]])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_shapes_equal_the_oracle(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9), "num_experts")
    shape = m2n.Shape(
        hidden=data.draw(st.sampled_from([1, 7, 64, 257, 520]), "hidden"),
        num_experts=num_experts,
        top_k=data.draw(st.integers(1, num_experts), "top_k"),
        max_tokens=data.draw(st.integers(1, 20), "max_tokens"),
        microbatches=data.draw(st.integers(1, 3), "microbatches"),
        dispatch_dtype=data.draw(st.sampled_from((*DTYPES, FLOAT8)), "dispatch_dtype"),
        combine_dtype=data.draw(st.sampled_from(DTYPES), "combine_dtype"),
        reduce_at=data.draw(st.sampled_from(["expert", "attention"]), "reduce_at"),
    )
    num_ranks = data.draw(st.integers(1, 4), "expert_ranks")
    ranks = st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks, unique=True)
    placement = m2n.Placement([data.draw(ranks) for _ in range(num_experts)], num_ranks)
    seed = data.draw(st.integers(0, 1000), "seed")
    layers = [
        testing.make_workload(shape, data.draw(st.sampled_from(testing.KINDS)), seed + i)
        for i in range(data.draw(st.integers(1, 4), "layers"))
    ]
    devices = ["cpu", "emulated", "tcp", *(["ucx", "ucx-put"] if m2n.features()["ucx"] else [])]
    check(shape, placement, [layers, layers[::-1]], device=data.draw(st.sampled_from(devices), "device"))
