# SPDX-License-Identifier: Apache-2.0
"""Ranks that come later, come back, or leave while others go on: placements that change between steps, experts that
move, new lives of expert ranks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import over
from test_exchange import to_numpy
from test_faults import IDS, ONE, SHAPE, SOON_S, TWO, WEIGHTS, X, attention, expert

import m2n
from m2n import testing
from m2n.testing import expert_outputs

pytestmark = over("auto", "tcp", "ucx")
LATER = m2n.Placement([[1], [1], [0], [0]])
# Expert 1 moves from rank 0 to rank 1: hosted by both, then by the new one alone.
BOTH = m2n.Placement([[0], [0, 1], [1], [1]])
MOVED = m2n.Placement([[0], [1], [1], [1]])


def exchange(comm: m2n.AttentionComm, *servers: m2n.ExpertComm) -> np.ndarray:
    """One dispatch with its answers; the result."""
    comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
    return finish(comm, *servers)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def meet(servers: list[m2n.ExpertComm], comms: list[m2n.AttentionComm]) -> None:
    """The expert ranks know that all are there, which takes a moment longer than it takes the attention ranks."""
    assert all(server.wait_peer(comm.rank, SOON_S) for server in servers for comm in comms)


def finish(comm: m2n.AttentionComm, *servers: m2n.ExpertComm) -> np.ndarray:
    """The answers to what was dispatched; the result."""
    for server in servers:
        batch = server.dispatch_recv(timeout=SOON_S)
        assert batch is not None
        server.combine_send(batch, expert_outputs(batch, batch.experts))
    y: np.ndarray = comm.combine_recv(timeout=SOON_S)
    return y


def test_the_next_life_of_an_expert_rank_is_joined_while_the_others_go_on(tmp_path: Path) -> None:
    with expert(tmp_path, TWO, rank=1) as other:
        with expert(tmp_path, TWO) as first, attention(tmp_path, TWO) as comm:
            expected = exchange(comm, first, other)
            first.close()
            until(lambda: comm.peers()[0].state == "left")  # the goodbye takes a moment
            with pytest.raises(m2n.PeerLost, match="expert rank 0"):
                exchange(comm, other)
            with pytest.raises(m2n.SetupError, match="the life that it has published has left"):
                comm.set_placement(TWO, timeout=0.5)
            assert comm.placement is TWO
            with expert(tmp_path, TWO) as second:
                comm.set_placement(TWO, timeout=SOON_S)
                assert [(peer.rank, peer.state) for peer in comm.peers()] == [(0, "left"), (1, "live"), (0, "live")]
                for _ in range(3):
                    assert np.array_equal(exchange(comm, second, other), expected)


def test_experts_move_to_a_rank_that_came_later(tmp_path: Path) -> None:
    with expert(tmp_path) as first, attention(tmp_path) as comm:
        expected = exchange(comm, first)
        joined: list[m2n.ExpertComm] = []
        thread = threading.Timer(0.1, lambda: joined.append(expert(tmp_path, LATER, rank=1)))
        thread.start()
        comm.set_placement(LATER, timeout=SOON_S)  # it waits for the new rank
        thread.join()
        with joined[0] as later:
            # What stayed where it was is summed in the order of the ranks, as before: two addends, so the same bits.
            assert np.array_equal(exchange(comm, first, later), expected)
            comm.set_placement(ONE)
            # Everybody hears of every dispatch, rows or not.
            assert np.array_equal(exchange(comm, first, later), expected)


def test_a_placement_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with expert(tmp_path), attention(tmp_path) as comm:
        with pytest.raises(ValueError, match="placement: places 3 experts, the shape has 4"):
            comm.set_placement(m2n.Placement.block(3, 1))
        with pytest.raises(m2n.SetupError, match="expert rank 1 could not be joined within .* not published"):
            comm.set_placement(TWO, timeout=0.2)
        assert comm.placement is ONE and SHAPE.num_experts == 4


class Traffic:
    """Two attention ranks, threads that keep two microbatches in flight each, and what they must get."""

    def __init__(self, tmp_path: Path, placement: m2n.Placement) -> None:
        self.experts = [expert(tmp_path, placement, rank) for rank in range(placement.num_expert_ranks)]
        self.comms = [attention(tmp_path, placement, rank) for rank in range(2)]
        meet(self.experts, self.comms)
        self.placement = placement  # what the attention ranks take before their next dispatch
        self.rounds = [0, 0]
        self.is_over = False
        self.futures: list[Future[None]] = []
        workloads = [testing.make_workload(SHAPE, "uniform", seed) for seed in range(3)]
        self.workloads = [(workload, to_numpy(workload)) for workload in workloads]
        self.expected: dict[tuple[m2n.Placement, int, int], np.ndarray] = {}

    def send(self, comm: m2n.AttentionComm, number: int) -> np.ndarray:
        """What combine_recv must give for it."""
        which = number % len(self.workloads)
        by_torch, workload = self.workloads[which]
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), number % 2, number)
        key = (comm.placement, which, comm.rank)
        if key not in self.expected:
            self.expected[key] = testing.oracle_combine(by_torch, SHAPE, comm.placement, comm.rank).numpy()
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
        until, deadline = [count + num_rounds for count in self.rounds], time.monotonic() + 4 * SOON_S
        while any(count < end for count, end in zip(self.rounds, until)):
            assert time.monotonic() < deadline, f"stuck at {self.rounds}, wanted {until}"
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


@pytest.mark.sanitize
def test_an_expert_moves_between_ranks_while_others_go_on(tmp_path: Path) -> None:
    with traffic(tmp_path, TWO) as load:
        first, other = load.experts
        for version in range(1, 6, 2):  # there and back again
            other.set_placement(m2n.Placement(BOTH.ranks_of_expert, version=version - 1))
            load.placement = m2n.Placement(MOVED.ranks_of_expert, version=version)
            first.wait_placement(version, SOON_S)
            assert first.placement_versions() == {0: version, 1: version}
            first.set_placement(load.placement)
            load.go_on()
            first.set_placement(m2n.Placement(BOTH.ranks_of_expert, version=version))
            load.placement = m2n.Placement(TWO.ranks_of_expert, version=version + 1)
            other.wait_placement(version + 1, SOON_S)
            other.set_placement(load.placement)
            load.go_on()
    # Nothing was lost, refused or done twice.
    sent, received = ([comm.stats() for comm in comms] for comms in (load.comms, load.experts))
    assert sum(stats["rows_sent"] for stats in sent) == sum(stats["rows_received"] for stats in received)
    assert sum(stats["rows_sent"] for stats in received) == sum(stats["rows_received"] for stats in sent)


@pytest.mark.sanitize
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_drains_and_leaves_while_others_go_on(tmp_path: Path, leaver: int) -> None:
    drain_and_leave(tmp_path, leaver)


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
        with attention(tmp_path, late, rank=2) as comm:
            load.send(comm, 0)
            assert np.array_equal(comm.combine_recv(0), load.expected[late, 0, 2])


@pytest.mark.sanitize
def test_wait_placement_names_the_rank_that_has_not_switched(tmp_path: Path) -> None:
    new = m2n.Placement.block(4, 1, version=7)
    with expert(tmp_path) as server, attention(tmp_path) as first, attention(tmp_path, rank=1) as second:
        meet([server], [first, second])
        assert server.placement_versions() == {0: 0, 1: 0}
        server.wait_placement(0, timeout=0)
        first.set_placement(new)
        with pytest.raises(m2n.Timeout, match="attention rank 0 has shown placement version 0"):
            server.wait_placement(7, timeout=0.01)  # it has not said so yet
        first.idle()
        until(lambda: server.placement_versions()[0] == 7)
        with pytest.raises(m2n.Timeout, match=r"wait_placement\(7\): attention rank 1 has shown .* 0 so far") as caught:
            server.wait_placement(7, timeout=0.01)
        assert caught.value.peer == 1 and server.placement_versions() == {0: 7, 1: 0}
        # A message that is not received yet counts, a wait that has begun sees it, and nobody waits for who has left.
        with ThreadPoolExecutor() as pool:
            waits = pool.submit(server.wait_placement, 7, SOON_S)
            second.set_placement(new)
            second.dispatch_send(X, second.route(IDS, WEIGHTS))
            waits.result()
        second.close()
        until(lambda: server.peers()[1].state == "left")
        assert server.placement_versions() == {0: 7}
        server.wait_placement(7, timeout=0)


def test_a_rank_shows_a_version_once_nothing_older_is_under_way(tmp_path: Path) -> None:
    """Else a message that overtakes another would let an expert go that the other one needs."""
    with expert(tmp_path) as server, attention(tmp_path) as comm:
        expected = exchange(comm, server)
        comm.dispatch_send(X, comm.route(IDS, WEIGHTS), microbatch=1)
        comm.set_placement(m2n.Placement.block(4, 1, version=3))
        comm.dispatch_send(X, comm.route(IDS, WEIGHTS), microbatch=0)
        for _ in range(2):
            batch = server.dispatch_recv(timeout=SOON_S)
            assert batch is not None and server.placement_versions() == {0: 0}
            server.combine_send(batch, expert_outputs(batch, batch.experts))
        assert np.array_equal(comm.combine_recv(0, timeout=SOON_S), expected)
        exchange(comm, server)
        assert server.placement_versions() == {0: 0}
        assert np.array_equal(comm.combine_recv(1, timeout=SOON_S), expected)
        comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
        server.wait_placement(3, SOON_S)


def test_a_lost_rank_ends_a_wait_for_another_one(tmp_path: Path) -> None:
    with expert(tmp_path) as server, attention(tmp_path) as first, attention(tmp_path, rank=1) as second:
        meet([server], [first, second])
        server._native.drop_peer(0)
        with pytest.raises(m2n.PeerLost, match=r"wait_placement\(1\): attention rank 0 is lost"):
            server.wait_placement(1, SOON_S)
        server.recover(0)
        second.set_placement(m2n.Placement.block(4, 1, version=1))
        second.idle()
        server.wait_placement(1, SOON_S)
        assert server.placement_versions() == {1: 1}


def test_an_expert_rank_changes_what_it_hosts(tmp_path: Path) -> None:
    """Batches that were received keep their experts; what comes later, or waits, goes by the new ones."""
    with expert(tmp_path, TWO, 0) as server, attention(tmp_path) as comm, attention(tmp_path, rank=1) as other:
        comm.dispatch_send(X[:1], comm.route(IDS[:1], WEIGHTS[:1]))  # experts 0 and 1
        open_batch = server.dispatch_recv(timeout=SOON_S)
        assert open_batch is not None and open_batch.experts == [0, 1]
        other.dispatch_send(X, other.route(IDS, WEIGHTS))  # and 2 and 3
        server.wait_work(SOON_S)
        server.set_placement(ONE)
        batch = server.dispatch_recv(timeout=SOON_S)
        assert batch is not None and batch.experts == [0, 1, 2, 3] and batch.peers == [1]
        server.set_placement(m2n.Placement([[1], [1], [0], [0]]))
        for late in (batch, open_batch):
            server.combine_send(late, expert_outputs(late, late.experts))
        expected = exchange_alone(X, IDS)
        assert np.array_equal(other.combine_recv(timeout=SOON_S), expected)
        assert np.array_equal(comm.combine_recv(timeout=SOON_S), expected[:1])
        comm.dispatch_send(X[:1], comm.route(IDS[:1], WEIGHTS[:1]))
        assert server.dispatch_recv(timeout=0.1) is None
        with pytest.raises(m2n.ProtocolError, match="expert rank 0 does not host expert 0"):
            comm.combine_recv(timeout=SOON_S)
        server.set_placement(m2n.Placement([[1]] * 4))  # hosts nothing
        with pytest.raises(m2n.ProtocolError, match="expert rank 0 does not host expert 2"):
            comm.dispatch_send(X[:1], comm.route(IDS[1:2], WEIGHTS[:1]))
            assert server.dispatch_recv(timeout=0.1) is None
            comm.combine_recv(timeout=SOON_S)


def exchange_alone(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What one rank that hosts everything gives back, with weights of a half."""
    half = np.float32(0.5)
    return np.stack([sum(half * testing.apply_expert(e, row) for e in sorted(of_row)) for row, of_row in zip(x, ids)])


def test_an_older_version_is_refused(tmp_path: Path) -> None:
    new, old = m2n.Placement.block(4, 1, version=2), m2n.Placement.block(4, 1, version=1)
    with expert(tmp_path, new) as server, attention(tmp_path, new) as comm:
        meet([server], [comm])
        for rank in (server, comm):
            with pytest.raises(ValueError, match="placement: its version 1 is older than 2, which .* has"):
                rank.set_placement(old)
            assert rank.placement is new
        route = comm.route(IDS, WEIGHTS)
        again = comm.route(IDS, WEIGHTS)
        comm.set_placement(m2n.Placement.block(4, 1, version=4))
        with pytest.raises(ValueError, match="route: it was made for version 2 of the placement, and this comm has 4"):
            comm.dispatch_send(X, route)
        comm.dispatch_send(X, comm.route(IDS, WEIGHTS, out=again))
        server.wait_placement(4, SOON_S)
        for version, error in ((-1, ValueError), (2**32, ValueError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(error, match="version: "):
                m2n.Placement([[0]], version=version)  # type: ignore[arg-type]
            with pytest.raises(error, match="version: "):
                server.wait_placement(version)  # type: ignore[arg-type]
        assert np.array_equal(finish(comm, server), exchange_alone(X, IDS))
        # Any number may come: it is only reported.
        comm.set_placement(m2n.Placement.block(4, 1, version=2**32 - 1))
        assert np.array_equal(exchange(comm, server), exchange_alone(X, IDS))
        assert server.placement_versions() == {0: 2**32 - 1}
