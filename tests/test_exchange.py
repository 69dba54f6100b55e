# SPDX-License-Identifier: Apache-2.0
"""The conformance suite: what every transport and every kind of rank must do, compared with the oracle bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import bodies
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m2n
from m2n import testing
from m2n.ranks import run_ranks, serve

SHAPE = m2n.Shape(
    hidden=72, num_experts=8, top_k=3, max_tokens=17, microbatches=2, dispatch_dtype="float32", combine_dtype="float32"
)
DTYPES = ("float32", "bfloat16", "float16")
# Replicated experts, uneven ranks.
REPLICAS = m2n.Placement([[0], [0, 1], [2], [1, 2], [0, 1, 2], [2], [1], [0, 2]])


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_numpy(workload: testing.Workload) -> testing.Workload:
    return testing.Workload(as_numpy(workload.x), workload.topk_ids.numpy(), workload.topk_weights.numpy())


def check(
    shape: m2n.Shape,
    placement: m2n.Placement,
    workloads: list[list[testing.Workload]],
    processes: bool = False,
    in_numpy: bool = False,
    **options: Any,
) -> None:
    """Runs the workloads [rank][layer] through the library and compares every result with the oracle."""
    given_workloads = [[to_numpy(w) for w in layers] for layers in workloads] if in_numpy else workloads
    config = dataclasses.replace(bodies.NUMPY, arrays="numpy" if in_numpy else "torch")
    results = run_ranks(
        bodies.pair(given_workloads, **options),
        len(workloads),
        placement.num_expert_ranks,
        shape=shape,
        placement=placement,
        processes=processes,
        config=config,
    )
    for rank, layers in enumerate(workloads):
        for layer, workload in enumerate(layers):
            expected = testing.oracle_combine(workload, shape, placement, rank)
            y = results["attention", rank][layer]
            y = torch.from_numpy(y.view(np.uint16) if y.dtype.name == "bfloat16" else y) if in_numpy else y
            y = y.view(torch.bfloat16) if y.dtype == torch.uint16 else y
            assert torch.equal(y, expected), f"attention rank {rank}, layer {layer}: differs from the oracle"


def all_kinds(shape: m2n.Shape, num_ranks: int) -> list[list[testing.Workload]]:
    """Every kind of workload as a layer, at a different layer on each rank."""
    kinds = testing.KINDS
    return [
        [testing.make_workload(shape, kinds[(i + rank) % len(kinds)], 10 * i + rank) for i in range(len(kinds))]
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_workload_equals_the_oracle_bit_for_bit(dtype: str, reduce_at: str) -> None:
    shape = dataclasses.replace(SHAPE, dispatch_dtype=dtype, combine_dtype=dtype, reduce_at=reduce_at)
    check(shape, REPLICAS, all_kinds(shape, 2))


@pytest.mark.parametrize("dispatch_dtype, combine_dtype", [("bfloat16", "float32"), ("float32", "float16")])
def test_directions_may_have_different_dtypes(dispatch_dtype: str, combine_dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dispatch_dtype=dispatch_dtype, combine_dtype=combine_dtype)
    check(shape, REPLICAS, all_kinds(shape, 2))


@pytest.mark.parametrize("m, n", [(1, 1), (3, 1), (1, 4), (3, 2), (2, 8)])
def test_any_number_of_ranks_on_either_side(m: int, n: int) -> None:
    check(SHAPE, m2n.Placement.block(8, n), all_kinds(SHAPE, m))


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_several_microbatches_in_flight(microbatches: int) -> None:
    shape = dataclasses.replace(SHAPE, microbatches=microbatches)
    check(shape, REPLICAS, all_kinds(shape, 2))


@pytest.mark.parametrize("dtype, reduce_at", [("bfloat16", "expert"), ("float32", "attention")])
def test_ranks_as_processes(dtype: str, reduce_at: str) -> None:
    shape = dataclasses.replace(SHAPE, dispatch_dtype=dtype, combine_dtype=dtype, reduce_at=reduce_at)
    check(shape, REPLICAS, all_kinds(shape, 2), processes=True, in_numpy=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_numpy_out(dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dispatch_dtype=dtype, combine_dtype=dtype)
    check(shape, REPLICAS, all_kinds(shape, 2), in_numpy=True)


def test_no_lingering_serves_each_message_alone_with_the_same_bits() -> None:
    check(SHAPE, REPLICAS, all_kinds(SHAPE, 3), linger_us=0)


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
        dispatch_dtype=data.draw(st.sampled_from(DTYPES), "dispatch_dtype"),
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
    check(shape, placement, [layers, layers[::-1]])


def run_one(attention: Any, expert: Any, shape: m2n.Shape = SHAPE, m: int = 1, n: int = 1) -> Any:
    config = dataclasses.replace(bodies.NUMPY, arrays="torch", timeout_s=10.0)
    return run_ranks((attention, expert), m, n, shape=shape, config=config, timeout=40)


def answer_all(comm: m2n.ExpertComm) -> int:
    return bodies.answer(comm, 1)


def test_x_may_have_strided_rows() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 1)
    wide = torch.full((17, 200), float("nan"))
    wide[:, 40:112] = workload.x

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        comm.dispatch_send(wide[:, 40:112], comm.route(workload.topk_ids, workload.topk_weights))
        out = torch.empty(17, 144)
        assert comm.combine_recv(out=out[:, :72]).data_ptr() == out.data_ptr()
        return out[:, :72]

    results = run_one(attention, answer_all)
    expected = testing.oracle_combine(workload, SHAPE, m2n.Placement.block(8, 1))
    assert torch.equal(results["attention", 0], expected)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_router_outputs_of_any_dtype(ids_dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    workload = testing.make_workload(SHAPE, "uniform", 2)
    weights = workload.topk_weights.to(weights_dtype)

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids.to(ids_dtype), weights))
        return comm.combine_recv()

    expected = testing.oracle_combine(
        dataclasses.replace(workload, topk_weights=weights.float()), SHAPE, m2n.Placement.block(8, 1)
    )
    assert torch.equal(run_one(attention, answer_all)["attention", 0], expected)


def test_a_route_can_be_used_again_and_cut_short() -> None:
    first, second = testing.make_workload(SHAPE, "uniform", 3), testing.make_workload(SHAPE, "padded", 4)

    def attention(comm: m2n.AttentionComm) -> list[torch.Tensor]:
        route = comm.route(first.topk_ids, first.topk_weights)
        comm.dispatch_send(first.x, route)
        with pytest.raises(ValueError, match="in flight"):
            comm.route(second.topk_ids, second.topk_weights, out=route)
        results = [comm.combine_recv()]
        again = comm.route(second.topk_ids, second.topk_weights, num_tokens=5, out=route)
        assert again is route and route.num_tokens == 5
        comm.dispatch_send(second.x[:5], route)
        return [*results, comm.combine_recv()]

    results = run_one(attention, answer_all)["attention", 0]
    placement = m2n.Placement.block(8, 1)
    short = testing.Workload(second.x[:5], second.topk_ids[:5], second.topk_weights[:5])
    assert torch.equal(results[0], testing.oracle_combine(first, SHAPE, placement))
    assert torch.equal(results[1], testing.oracle_combine(short, SHAPE, placement))


def test_ready_made_splits_give_one_result_per_row() -> None:
    shape = dataclasses.replace(SHAPE, top_k=2)
    x = torch.randn(5, 72)
    ids = torch.tensor([[0, 3], [1, -1], [4, 5], [7, -1], [6, 4]])  # rank 0 hosts 0..3, rank 1 hosts 4..7
    weights = torch.tensor([[0.5, 0.25], [1.0, 9.0], [0.5, 0.5], [0.125, 9.0], [0.3, 0.7]])

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        route = m2n.Route.from_splits([2, 3], ids, weights, shape=shape)
        assert route.rows_per_rank == [2, 3]
        comm.dispatch_send(x, route)
        return comm.combine_recv()

    y = run_one(attention, answer_all, shape, n=2)["attention", 0]
    assert torch.equal(y, testing.oracle_combine(testing.Workload(x, ids, weights), shape, m2n.Placement.block(8, 2)))


def test_a_token_goes_to_an_expert_rank_once() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 6)

    def attention(comm: m2n.AttentionComm) -> tuple[int, dict[str, float]]:
        route = comm.route(workload.topk_ids, workload.topk_weights)
        comm.dispatch_send(workload.x, route)
        comm.combine_recv()
        return route.num_rows, comm.stats()

    num_rows, stats = run_one(attention, answer_all)["attention", 0]
    assert num_rows == 17 and stats["rows_sent"] == 17 and stats["rows_received"] == 17
    assert stats["bytes_sent"] == 64 + 17 * (72 * 4 + 2 * 4 * 3)


def test_rows_are_read_where_they_landed() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 7)

    def attention(comm: m2n.AttentionComm) -> None:
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights))
        comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        batch = comm.dispatch_recv()
        again = batch.x
        assert again.data_ptr() == batch.x.data_ptr() and batch.x.shape[1] == 72
        assert torch.equal(batch.x[batch.row_index_by_expert], batch.gather())
        assert float(batch.x.sum()) == float(batch.x[: 17 * 3].sum())  # holes read as zero
        padded = batch.gather("padded")
        offsets = batch.expert_offsets.tolist()
        for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
            assert torch.equal(padded[e, : end - begin], batch.gather()[begin:end])
            assert not padded[e, end - begin :].any()
        assert comm.stats()["rows_gathered"] > 0
        assert batch.peers == [0] and batch.num_rows == 17 and batch.num_pairs == 51
        comm.combine_send(batch, batch.gather())
        with pytest.raises(m2n.Error, match="combine_send has given the rows back"):
            _ = batch.x
        with pytest.raises(ValueError, match="already called"):
            comm.combine_send(batch, torch.zeros(51, 72))

    run_one(attention, expert)


def test_the_caller_may_reduce_by_itself() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 8)

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights))
        return comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        batch = comm.dispatch_recv()
        comm.combine_send(batch, 3 * workload.x, reduced=True)

    assert torch.equal(run_one(attention, expert)["attention", 0], 3 * workload.x)


def test_start_order_does_not_matter_and_links_are_pairwise(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    import threading
    import time

    placement = m2n.Placement.block(8, 1)
    workload = testing.make_workload(SHAPE, "uniform", 9)
    results = {}

    def attention() -> None:
        with m2n.AttentionComm(0, SHAPE, placement, tmp_path, config=bodies.NUMPY) as comm:
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights))
            results["y"] = comm.combine_recv()

    thread = threading.Thread(target=attention)
    thread.start()
    time.sleep(2.6)  # it says whom it waits for
    with m2n.ExpertComm(
        0, SHAPE, placement, tmp_path, config=dataclasses.replace(bodies.NUMPY, arrays="torch")
    ) as comm:
        assert comm.wait_peer(0)
        bodies.answer(comm, 1)
    thread.join()
    assert torch.equal(results["y"], testing.oracle_combine(workload, SHAPE, placement))
    assert "attention rank 0 waits for expert rank 0" in capfd.readouterr().err


def test_strict_lockstep_waits_for_all_listed_ranks() -> None:
    workloads = all_kinds(SHAPE, 3)
    num_layers = len(workloads[0])

    def expert(comm: m2n.ExpertComm) -> None:
        experts = comm.placement.experts_of(comm.rank)
        for _ in range(num_layers):
            batch = comm.dispatch_recv(linger_us=None, attention_ranks=[0, 1, 2])
            assert sorted(batch.peers) == [0, 1, 2]
            comm.combine_send(batch, testing.expert_outputs(batch, experts))

    def attention(comm: m2n.AttentionComm) -> list[torch.Tensor]:
        return bodies.exchange(comm, workloads)

    results = run_one(attention, expert, m=3, n=2)
    for rank in range(3):
        for layer, workload in enumerate(workloads[rank]):
            expected = testing.oracle_combine(workload, SHAPE, m2n.Placement.block(8, 2), rank)
            assert torch.equal(results["attention", rank][layer], expected)


def test_an_idle_rank_is_not_waited_for() -> None:
    """With an hour of lingering, the second layer would take an hour if the idle rank were still expected."""
    workload = testing.make_workload(SHAPE, "uniform", 10)

    def attention(comm: m2n.AttentionComm) -> None:
        for layer in range(3):
            if layer > 0 and comm.rank == 1:
                comm.idle()
                break
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), layer=layer)
            comm.combine_recv()
        if comm.rank == 1:  # stays, idle, until rank 0 has gone on
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), layer=9)
            comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        assert comm.wait_peer(0) and comm.wait_peer(1)
        served: list[tuple[int, list[int]]] = []
        while len(served) < 5 and sum(len(peers) for _, peers in served) < 5:
            batch = comm.dispatch_recv(linger_us=2e6)
            served.append((batch.layer, batch.peers))
            comm.combine_send(batch, batch.gather())
        assert sum(len(peers) for _, peers in served) == 5

    run_one(attention, expert, m=2)


def test_waiting_for_any_of_several_microbatches() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 11)

    def attention(comm: m2n.AttentionComm) -> list[int]:
        for microbatch in (0, 1):
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), microbatch, layer=0)
        order = []
        waiting = [0, 1]
        while waiting:
            microbatch = comm.wait_ready(waiting, timeout=10)
            assert comm.ready(microbatch)
            comm.combine_recv(microbatch)
            order.append(microbatch)
            waiting.remove(microbatch)
        assert comm.wait_ready([0, 1], timeout=0.01) is None
        return order

    def expert(comm: m2n.ExpertComm) -> None:
        assert comm.wait_work(5) == (0, 0)
        for microbatch in (1, 0):
            batch = comm.dispatch_recv(layer=0, microbatch=microbatch)
            assert batch.microbatch == microbatch
            if microbatch == 0:
                import time

                time.sleep(0.1)
            comm.combine_send(batch, batch.gather())
        assert comm.dispatch_recv(timeout=0) is None and comm.dispatch_recv(timeout=0.01) is None
        assert comm.wait_work(0.01) is None

    assert run_one(attention, expert)["attention", 0] == [1, 0]


@pytest.mark.sanitize
def test_microbatches_driven_by_different_threads() -> None:
    import threading

    shape = dataclasses.replace(SHAPE, microbatches=4)
    workloads = [to_numpy(testing.make_workload(shape, "uniform", i)) for i in range(4)]

    def attention(comm: m2n.AttentionComm) -> None:
        expected = [
            as_numpy(testing.oracle_combine(testing.make_workload(shape, "uniform", i), shape, comm.placement))
            for i in range(4)
        ]
        errors: list[BaseException] = []

        def drive(microbatch: int) -> None:
            try:
                w = workloads[microbatch]
                for layer in range(20):
                    comm.dispatch_send(w.x, comm.route(w.topk_ids, w.topk_weights), microbatch, layer)
                    assert np.array_equal(comm.combine_recv(microbatch), expected[microbatch])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=drive, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors

    def expert(comm: m2n.ExpertComm) -> None:
        experts = comm.placement.experts_of(comm.rank)
        serve(comm, 1, lambda batch: testing.expert_outputs(batch, experts))

    run_ranks((attention, expert), 1, 2, shape=shape, config=bodies.NUMPY)
