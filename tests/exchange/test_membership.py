# SPDX-License-Identifier: Apache-2.0
"""Ranks that come later, come back, or leave while others go on: placements that change between steps, experts that
move, new lives of expert ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bodies import ONE, SMALL, small_attention, small_expert
from conftest import over
from small_case import IDS, TWO, WEIGHTS, X
from traffic import drain_and_leave, meet, traffic
from waits import SOON_S, until

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


def finish(comm: m2n.AttentionComm, *servers: m2n.ExpertComm) -> np.ndarray:
    """The answers to what was dispatched; the result."""
    for server in servers:
        batch = server.dispatch_recv(timeout=SOON_S)
        assert batch is not None
        server.combine_send(batch, expert_outputs(batch, batch.experts))
    y: np.ndarray = comm.combine_recv(timeout=SOON_S)
    return y


def test_the_next_life_of_an_expert_rank_is_joined_while_the_others_go_on(tmp_path: Path) -> None:
    with small_expert(tmp_path, TWO, rank=1) as other:
        with small_expert(tmp_path, TWO) as first, small_attention(tmp_path, TWO) as comm:
            expected = exchange(comm, first, other)
            first.close()
            until(lambda: comm.peers()[0].state == "left")  # the goodbye takes a moment
            with pytest.raises(m2n.PeerLost, match="expert rank 0"):
                exchange(comm, other)
            with pytest.raises(m2n.SetupError, match="the life that it has published has left"):
                comm.set_placement(TWO, timeout=0.5)
            assert comm.placement is TWO
            with small_expert(tmp_path, TWO) as second:
                comm.set_placement(TWO, timeout=SOON_S)
                assert [(peer.rank, peer.state) for peer in comm.peers()] == [(0, "left"), (1, "live"), (0, "live")]
                for _ in range(3):
                    assert np.array_equal(exchange(comm, second, other), expected)


def test_experts_move_to_a_rank_that_came_later(tmp_path: Path) -> None:
    with small_expert(tmp_path) as first, small_attention(tmp_path) as comm:
        expected = exchange(comm, first)
        joined: list[m2n.ExpertComm] = []
        thread = threading.Timer(0.1, lambda: joined.append(small_expert(tmp_path, LATER, rank=1)))
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
    with small_expert(tmp_path), small_attention(tmp_path) as comm:
        with pytest.raises(ValueError, match="placement: places 3 experts, the shape has 4"):
            comm.set_placement(m2n.Placement.block(3, 1))
        with pytest.raises(m2n.SetupError, match="expert rank 1 could not be joined within .* not published"):
            comm.set_placement(TWO, timeout=0.2)
        assert comm.placement is ONE and SMALL.num_experts == 4


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


@pytest.mark.sanitize
def test_wait_placement_names_the_rank_that_has_not_switched(tmp_path: Path) -> None:
    new = m2n.Placement.block(4, 1, version=7)
    with (
        small_expert(tmp_path) as server,
        small_attention(tmp_path) as first,
        small_attention(tmp_path, rank=1) as second,
    ):
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
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
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
    with (
        small_expert(tmp_path) as server,
        small_attention(tmp_path) as first,
        small_attention(tmp_path, rank=1) as second,
    ):
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
    with (
        small_expert(tmp_path, TWO, 0) as server,
        small_attention(tmp_path) as comm,
        small_attention(tmp_path, rank=1) as other,
    ):
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
    with small_expert(tmp_path, new) as server, small_attention(tmp_path, new) as comm:
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
