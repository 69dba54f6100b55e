# SPDX-License-Identifier: Apache-2.0
"""Ranks in one process: message numbers that wrap, threads that share a comm, comms side by side, many peers."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from bodies import NEAR_THE_END, NUMPY, SMALL, small_attention, small_dispatch, small_expert
from oracle import REPLICAS, SHAPE, all_kinds, are_equal, as_numpy, check, drive_and_serve, oracles, to_numpy
from waits import WAIT_S

import m2n
from m2n import testing
from m2n.ranks import run_ranks

# Message numbers


@pytest.fixture
def near_the_end() -> Any:
    testing.start_seq_at(NEAR_THE_END)
    yield
    testing.start_seq_at(0)


@pytest.mark.sanitize
@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
def test_message_numbers_may_wrap(reduce_at: Any, near_the_end: None) -> None:
    """Every slot goes eight times round: three microbatches, messages with and without rows."""
    shape = dataclasses.replace(SHAPE, microbatches=3, reduce_at=reduce_at)
    check(shape, REPLICAS, [layers * 4 for layers in all_kinds(shape, 2)], in_numpy=True)


def test_idling_and_lockstep_while_message_numbers_wrap(near_the_end: None, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        for _ in range(8):
            expected = small_dispatch(comm)
            batch = server.dispatch_recv(linger_us=None, attention_ranks=[0])
            server.combine_send(batch, testing.expert_outputs(batch, range(4)))
            assert np.array_equal(comm.combine_recv(), expected)
            comm.idle()  # a message of its own on each slot, answered when the server looks
            assert server.dispatch_recv(timeout=0) is None
        assert comm.stats()["messages_sent"] == 8 * (1 + SMALL.microbatches)


@pytest.mark.parametrize("of_server, of_client", [(NEAR_THE_END, 0), (0, NEAR_THE_END)])
def test_start_seq_at_reaches_both_roles(of_server: int, of_client: int, near_the_end: None, tmp_path: Path) -> None:
    """Ends that count from different numbers do not understand each other."""
    testing.start_seq_at(of_server)
    with small_expert(tmp_path) as server:
        testing.start_seq_at(of_client)
        with small_attention(tmp_path) as comm:
            small_dispatch(comm)
            with pytest.raises(m2n.ProtocolError, match=f"expected message {of_server + 1} .* saw {of_client + 1}"):
                server.dispatch_recv()


# Threads, and several comms in one process


@pytest.mark.sanitize
def test_microbatches_driven_and_served_by_different_threads() -> None:
    drive_and_serve(NUMPY)


def test_a_route_is_used_again_while_other_threads_send() -> None:
    """To use a route again is to ask whether one of the microbatches in flight has it; here 56 do, and 6 change."""
    shape = dataclasses.replace(SMALL, microbatches=62)
    ids, weights, x = np.array([[0, 1]] * 8, np.int32), np.ones((8, 2), np.float32), np.ones((8, 64), np.float32)

    def attend(comm: m2n.AttentionComm) -> None:
        ended = threading.Event()

        def drive(microbatch: int) -> None:
            route = comm.route(ids, weights)
            while not ended.is_set():
                comm.dispatch_send(x, route, microbatch)
                comm.combine_recv(microbatch)

        for microbatch in range(6, 62):
            comm.dispatch_send(x, comm.route(ids, weights), microbatch)
        with ThreadPoolExecutor(6) as pool:
            driven = [pool.submit(drive, microbatch) for microbatch in range(6)]
            try:
                spare = comm.route(ids[:1], weights[:1])
                for _ in range(10_000):
                    assert comm.route(ids[:1], weights[:1], out=spare) is spare
            finally:
                ended.set()
            assert [future.result(WAIT_S) for future in driven] == [None] * 6
        for microbatch in range(6, 62):
            comm.combine_recv(microbatch)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of what looks like one step
    try:
        run_ranks((attend, lambda comm: bodies.answer(comm, 1)), 1, 1, shape=shape, config=NUMPY)
    finally:
        sys.setswitchinterval(before)


def test_comms_of_several_names_live_side_by_side(tmp_path: Path) -> None:
    """The same ranks, three comms of different shapes; one is closed, then opened again with yet another shape."""
    wide = dataclasses.replace(SHAPE, hidden=520, reduce_at="attention", microbatches=1)
    shapes = {"a": SHAPE, "b": wide, "c": dataclasses.replace(SHAPE, combine_dtype="float16", max_tokens=3)}
    placement = m2n.Placement.block(8, 1)
    with contextlib.ExitStack() as stack:

        def open_pairs(names: str) -> None:
            for role in (m2n.ExpertComm, m2n.AttentionComm):  # all expert ranks are there before the first that joins
                for name in names:
                    comm: Any = role(0, shapes[name], placement, tmp_path, name=name, config=NUMPY)
                    pairs.setdefault(name, []).append(stack.enter_context(comm))

        def exchange(names: str) -> None:
            given = {name: testing.make_workload(shapes[name], "uniform", ord(name)) for name in names}
            for name in names:
                workload = to_numpy(given[name])
                pairs[name][1].dispatch_send(workload.x, pairs[name][1].route(workload.topk_ids, workload.topk_weights))
            for name in reversed(names):
                batch = pairs[name][0].dispatch_recv()
                pairs[name][0].combine_send(batch, testing.expert_outputs(batch, range(8)))
            for name in names:
                expected = testing.oracle_combine(given[name], shapes[name], placement)
                assert np.array_equal(pairs[name][1].combine_recv(), as_numpy(expected)), name

        pairs: dict[str, list[Any]] = {}
        open_pairs("abc")
        exchange("abc")
        for comm in pairs.pop("b"):
            comm.close()
        exchange("ca")
        assert all(comm.peers()[0].state == "live" for name in "ac" for comm in pairs[name])
        shapes["b"] = dataclasses.replace(SHAPE, top_k=1)
        open_pairs("b")
        exchange("bca")


# Many peers


def test_sixty_four_attention_ranks_and_one_too_many(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, hidden=16, max_tokens=4)
    placement = m2n.Placement.block(8, 2)
    workloads = all_kinds(shape, 64)
    given = [list(map(to_numpy, layers)) for layers in workloads]

    def join(rank: int) -> m2n.AttentionComm:
        return m2n.AttentionComm(rank, shape, placement, tmp_path, config=NUMPY)

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(66))
        servers = [
            stack.enter_context(m2n.ExpertComm(rank, shape, placement, tmp_path, max_peers=64, config=NUMPY))
            for rank in range(2)
        ]
        comms = [stack.enter_context(comm) for comm in pool.map(join, range(64))]
        with pytest.raises(m2n.SetupError, match="max_peers=64 .* make it with a larger max_peers") as caught:
            join(64)
        assert "attention rank 64 was refused by expert rank 0" in str(caught.value)
        served = [pool.submit(bodies.answer, server, 64) for server in servers]
        results = list(pool.map(bodies.exchange, comms, [given] * 64))
        for comm in comms:
            comm.close()
        assert all(future.result(WAIT_S) > 0 for future in served)
    for rank, expected in enumerate(oracles(workloads, shape, placement)):
        assert are_equal(results[rank], expected), f"attention rank {rank}"
