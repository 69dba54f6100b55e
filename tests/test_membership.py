# SPDX-License-Identifier: Apache-2.0
"""Ranks that come later and ranks that come back: placements that change between steps, new lives of expert ranks."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from test_faults import IDS, ONE, SHAPE, SOON_S, TWO, WEIGHTS, X, attention, expert

import m2n
from m2n.testing import expert_outputs

pytestmark = [
    pytest.mark.usefixtures("transport"),
    pytest.mark.parametrize("transport", ("auto", pytest.param("ucx", marks=pytest.mark.ucx)), indirect=True),
]
LATER = m2n.Placement([[1], [1], [0], [0]])


def exchange(comm: m2n.AttentionComm, *servers: m2n.ExpertComm) -> np.ndarray:
    """One dispatch with its answers; the result."""
    comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
    for server in servers:
        batch = server.dispatch_recv(timeout=SOON_S)
        assert batch is not None
        server.combine_send(batch, expert_outputs(batch, server.placement.experts_of(server.rank)))
    y: np.ndarray = comm.combine_recv(timeout=SOON_S)
    return y


def test_the_next_life_of_an_expert_rank_is_joined_while_the_others_go_on(tmp_path: Path) -> None:
    with expert(tmp_path, TWO, rank=1) as other:
        with expert(tmp_path, TWO) as first, attention(tmp_path, TWO) as comm:
            expected = exchange(comm, first, other)
            first.close()
            with pytest.raises(m2n.PeerLost, match="expert rank 0"):
                while True:  # the goodbye takes a moment
                    exchange(comm, other)
            with pytest.raises(m2n.SetupError, match="the life that it has published is lost or has left"):
                comm.set_placement(TWO, timeout=0.2)
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
            comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
            for server in (first, later):
                batch = server.dispatch_recv(timeout=SOON_S, linger_us=0)
                if batch is not None:
                    server.combine_send(batch, expert_outputs(batch, server.placement.experts_of(server.rank)))
            assert np.array_equal(comm.combine_recv(timeout=SOON_S), expected)


def test_a_placement_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with expert(tmp_path), attention(tmp_path) as comm:
        with pytest.raises(ValueError, match="placement: places 3 experts, the shape has 4"):
            comm.set_placement(m2n.Placement.block(3, 1))
        with pytest.raises(m2n.SetupError, match="expert rank 1 could not be joined within 0.2.* not published"):
            comm.set_placement(TWO, timeout=0.2)
        assert comm.placement is ONE and SHAPE.num_experts == 4
