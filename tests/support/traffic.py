# SPDX-License-Identifier: Apache-2.0
"""Traffic that goes on while ranks come, move and leave, and results that it must give."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bodies import SMALL, small_attention, small_expert
from oracle import to_numpy
from small_case import TWO
from waits import SOON_S, WAIT_S, until

import m2n
from m2n import testing
from m2n.testing import expert_outputs


def meet(servers: list[m2n.ExpertComm], comms: list[m2n.AttentionComm]) -> None:
    """The expert ranks know that all are there, which takes a moment longer than it takes the attention ranks."""
    assert all(server.wait_peer(comm.rank, SOON_S) for server in servers for comm in comms)


class Traffic:
    """Two attention ranks, threads that keep two microbatches in flight each, and what they must get."""

    def __init__(self, tmp_path: Path, placement: m2n.Placement) -> None:
        self.experts = [small_expert(tmp_path, placement, rank) for rank in range(placement.num_expert_ranks)]
        self.comms = [small_attention(tmp_path, placement, rank) for rank in range(2)]
        meet(self.experts, self.comms)
        self.placement = placement  # what the attention ranks take before their next dispatch
        self.rounds = [0, 0]
        self.is_over = False
        self.futures: list[Future[None]] = []
        workloads = [testing.make_workload(SMALL, "uniform", seed) for seed in range(3)]
        self.workloads = [(workload, to_numpy(workload)) for workload in workloads]
        self.expected: dict[tuple[m2n.Placement, int, int], np.ndarray] = {}

    def send(self, comm: m2n.AttentionComm, number: int) -> np.ndarray:
        """What combine_recv must give for it."""
        which = number % len(self.workloads)
        by_torch, workload = self.workloads[which]
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), number % 2, number)
        key = (comm.placement, which, comm.rank)
        if key not in self.expected:
            self.expected[key] = testing.oracle_combine(by_torch, SMALL, comm.placement, comm.rank).numpy()
        return self.expected[key]

    def attend(self, comm: m2n.AttentionComm) -> None:
        with comm:  # whoever fails leaves, so that the others come to their end
            number, in_flight = 0, [self.send(comm, 0)]
            while in_flight:
                if comm.placement is not self.placement:
                    comm.set_placement(self.placement, timeout=SOON_S)  # the other microbatch went by the old one
                if not self.is_over:
                    in_flight.append(self.send(comm, number + 1))
                y = comm.combine_recv(number % 2)
                assert np.array_equal(y, in_flight.pop(0)), f"round {number} with {comm.placement}"
                number += 1
                self.rounds[comm.rank] = number
            comm.check()

    def serve(self, comm: m2n.ExpertComm, is_done: Callable[[], bool]) -> None:
        with comm:
            while not is_done():
                batch = comm.dispatch_recv(timeout=0.02)
                if batch is not None:
                    comm.combine_send(batch, expert_outputs(batch, batch.experts))

    def serve_to_the_end(self, comm: m2n.ExpertComm) -> None:
        self.serve(comm, lambda: self.is_over and all(peer.state == "left" for peer in comm.peers()))

    def go_on(self, num_rounds: int = 5) -> None:
        """Until every attention rank has gone on by some rounds."""
        ends, deadline = [count + num_rounds for count in self.rounds], time.monotonic() + WAIT_S
        while any(count < end for count, end in zip(self.rounds, ends)):
            assert time.monotonic() < deadline, f"stuck at {self.rounds}, wanted {ends}"
            for future in self.futures:
                if future.done():
                    future.result()
            time.sleep(0.001)


@contextlib.contextmanager
def traffic(tmp_path: Path, placement: m2n.Placement, *leavers: tuple[int, int]) -> Iterator[Traffic]:
    """`leavers`: (expert rank, the placement version from when on nobody needs it, which it waits for and leaves)."""
    load, version_of = Traffic(tmp_path, placement), dict(leavers)

    def leave(comm: m2n.ExpertComm) -> None:
        load.serve(comm, lambda: min(comm.placement_versions().values()) >= version_of[comm.rank])

    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for comm in (*load.experts, *load.comms):
            stack.enter_context(comm)
        load.futures += [pool.submit(load.attend, comm) for comm in load.comms]
        for server in load.experts:
            load.futures.append(pool.submit(leave if server.rank in version_of else load.serve_to_the_end, server))
        try:
            load.go_on()
            yield load
            load.go_on()
        finally:
            load.is_over = True  # with two microbatches in flight every thread comes to its end, or to its deadline
        for future in load.futures:
            future.result()


def drain_and_leave(tmp_path: Path, leaver: int) -> None:
    stayer = 1 - leaver
    with traffic(tmp_path, TWO, (leaver, 1)) as load:
        load.experts[stayer].set_placement(m2n.Placement([sorted({rank, stayer}) for (rank,) in TWO.ranks_of_expert]))
        load.placement = m2n.Placement([[stayer]] * 4, num_expert_ranks=2, version=1)
        load.futures[2 + leaver].result(SOON_S)
        states = lambda comm: {peer.rank: peer.state for peer in comm.peers()}  # noqa: E731
        until(lambda: all(states(comm)[leaver] == "left" for comm in load.comms))  # the goodbye takes a moment
        load.go_on()  # attend() calls check() at its end
        # Whoever comes later does not wait for the rank that has left, nor do those that it has left.
        late = load.placement = m2n.Placement([[stayer]] * 4, num_expert_ranks=2, version=2)
        assert late.members == [stayer]
        with small_attention(tmp_path, late, rank=2) as comm:
            load.send(comm, 0)
            assert np.array_equal(comm.combine_recv(0), load.expected[late, 0, 2])
