# SPDX-License-Identifier: Apache-2.0
"""What each verb promises: borrowing, windows, order of waiting, lingering, idling, threads."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from typing import Any

import bodies
import numpy as np
import pytest
import torch
from oracle import SHAPE, all_kinds, as_numpy, run_one, to_numpy

import m2n
from m2n import testing
from m2n.ranks import run_ranks, serve


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


def test_a_poll_never_lingers() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 12)
    is_over = threading.Event()

    def attention(comm: m2n.AttentionComm) -> None:
        for layer in range(1 + comm.rank):
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), layer=layer)
            comm.combine_recv()
        is_over.wait(20)

    def expert(comm: m2n.ExpertComm) -> None:
        seen: set[int] = set()
        while len(seen) < 2:  # both ranks are expected from here on
            batch = comm.dispatch_recv(layer=0, linger_us=0)
            seen.update(batch.peers)
            comm.combine_send(batch, batch.gather())
        assert comm.wait_work(5) == (1, 0)
        began = time.monotonic()
        assert comm.dispatch_recv(linger_us=30e6, timeout=0) is None
        assert comm.dispatch_recv(linger_us=30e6, timeout=0.01) is None
        assert time.monotonic() - began < 10
        batch = comm.dispatch_recv(linger_us=0, timeout=0)
        comm.combine_send(batch, batch.gather())
        is_over.set()

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
        assert comm.wait_ready([1, 0]) == 1 and comm.ready(0)  # now dispatch_send would go
        assert comm.wait_ready([], timeout=0.01) is None
        return order

    def expert(comm: m2n.ExpertComm) -> None:
        assert comm.wait_work(5) == (0, 0)
        for microbatch in (1, 0):
            batch = comm.dispatch_recv(layer=0, microbatch=microbatch)
            assert batch.microbatch == microbatch
            if microbatch == 0:
                time.sleep(0.1)
            comm.combine_send(batch, batch.gather())
        assert comm.dispatch_recv(timeout=0) is None and comm.dispatch_recv(timeout=0.01) is None
        assert comm.wait_work(0.01) is None

    assert run_one(attention, expert)["attention", 0] == [1, 0]


def test_a_microbatch_is_ready_for_dispatch_when_its_empty_messages_are_answered() -> None:
    """An expert rank without rows looks late: who would dispatch meanwhile waits in wait_ready, not in the verb."""
    workload = testing.make_workload(SHAPE, "uniform", 14)
    ids = torch.full_like(workload.topk_ids, -1)
    ids[:, 0] = 0  # expert 0, on rank 0: rank 1 gets an empty message
    is_asked = threading.Event()
    delay_s = 0.2

    def attention(comm: m2n.AttentionComm) -> None:
        route = comm.route(ids, workload.topk_weights)
        assert comm.ready(0) and comm.ready(1)  # nothing was sent yet
        comm.dispatch_send(workload.x, route)
        assert comm.wait_ready([0]) == 0
        comm.combine_recv()
        assert not comm.ready(0) and comm.wait_ready([0], timeout=0.01) is None
        assert comm.wait_ready([0, 1]) == 1
        with pytest.raises(ValueError, match="microbatch: expected 0 to 1, got 2"):
            comm.ready(2)
        with pytest.raises(ValueError, match="microbatch: expected 0 to 1, got 2"):
            comm.wait_ready([2])
        began = time.monotonic()
        is_asked.set()
        assert comm.wait_ready([0]) == 0 and comm.ready(0)
        assert time.monotonic() - began >= delay_s
        began = time.monotonic()
        comm.dispatch_send(workload.x, route, layer=1)
        assert time.monotonic() - began < delay_s
        comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        if comm.rank == 1:
            assert is_asked.wait(10)
            time.sleep(delay_s)
        answer_all(comm)

    run_one(attention, expert, n=2)


@pytest.mark.sanitize
def test_microbatches_driven_by_different_threads() -> None:
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


def test_run_ranks_raises_the_error_that_came_first() -> None:
    workload = testing.make_workload(SHAPE, "uniform", 13)

    def attention(comm: m2n.AttentionComm) -> None:
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights))
        comm.combine_recv()  # ends with PeerLost, but only because the expert rank failed

    def expert(comm: m2n.ExpertComm) -> None:
        assert comm.dispatch_recv() is not None
        raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        run_one(attention, expert)
