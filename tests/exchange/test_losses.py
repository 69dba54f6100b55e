# SPDX-License-Identifier: Apache-2.0
"""What becomes of rows that will not come, of peers that live and do not answer, and of what came before an end."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from bodies import ONE, SMALL, small_attention, small_expert
from conftest import over
from small_case import IDS, TWO, WEIGHTS, X, answer, dispatch, start
from waits import SOON_S, WAIT_S, until

import m2n
from m2n.ranks import serve
from m2n.testing import expert_outputs

__all__ = ["start"]
pytestmark = over("auto", "ucx")
on_both = pytest.mark.parametrize("device", ["cpu", "emulated"])
HERE = (X[:1], IDS[:1], WEIGHTS[:1])  # for expert rank 0 of TWO alone
FIRST = m2n.Placement([[0]] * 4, num_expert_ranks=2, version=1)  # rank 1 hosts nothing


def config(**changes: Any) -> m2n.Config:
    return dataclasses.replace(bodies.NUMPY, **changes)


def send(comm: m2n.AttentionComm, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, microbatch: int = 0) -> None:
    comm.dispatch_send(x, comm.route(ids, weights), microbatch)


def last_states(comm: Any) -> dict[int, str]:
    """By rank, of its newest life."""
    return {peer.rank: peer.state for peer in comm.peers()}


def strictly(comm: m2n.ExpertComm, ranks: list[int], **options: Any) -> Any:
    return comm.dispatch_recv(linger_us=None, attention_ranks=ranks, **{"timeout": SOON_S, **options})


def reply(comm: m2n.ExpertComm, batch: Any) -> None:
    comm.combine_send(batch, expert_outputs(batch, batch.experts))


def test_rows_that_will_not_come_are_told_by_number_and_nan_only_where_it_is_asked_for(tmp_path: Path) -> None:
    with (
        small_expert(tmp_path, TWO, 0) as kept,
        small_expert(tmp_path, TWO, 1) as gone,
        small_attention(tmp_path, TWO) as comm,
    ):
        for microbatch in (0, 1):
            dispatch(comm, microbatch)
            answer(kept)
        assert comm.missing(0) == comm.missing(1) == {}
        gone.close()
        with pytest.raises(
            m2n.PeerLost, match=r"expert rank 1 has left.*; rows of 2 tokens \(1, 2\) will not"
        ) as caught:
            comm.combine_recv(0)
        assert caught.value.missing == comm.missing(0) == {1: [1, 2]}
        comm.recover(1)
        assert comm.ready(1)  # it would raise
        for microbatch in (0, 1, 1):  # also of microbatches of which nothing was told yet
            with pytest.raises(m2n.PeerLost, match="it was given up; rows of 2 tokens") as caught:
                comm.combine_recv(microbatch)
            assert caught.value.peer == 1 and caught.value.missing == {1: [1, 2]}
            with pytest.raises(m2n.SlotBusy):
                send(comm, *HERE, microbatch=microbatch)
        for microbatch in (0, 1):
            y = comm.combine_recv(microbatch, missing="nan")
            assert np.isnan(y).all(1).tolist() == [False, True, True]
            send(comm, *HERE, microbatch=microbatch)
            answer(kept)
            assert np.isfinite(comm.combine_recv(microbatch)).all() and comm.missing(microbatch) == {}
        with pytest.raises(m2n.PeerLost, match="the route needs it.*set_placement") as caught:
            dispatch(comm)
        assert caught.value.missing == {}  # nothing is in flight


def test_all_others_are_waited_for_before_nan_is_given(tmp_path: Path) -> None:
    with (
        small_expert(tmp_path, TWO, 0) as kept,
        small_expert(tmp_path, TWO, 1) as gone,
        small_attention(tmp_path, TWO) as comm,
    ):
        dispatch(comm)
        gone.close()
        with pytest.raises(m2n.Timeout, match="expert rank 0 is alive"):
            comm.combine_recv(missing="nan", timeout=0.02)
        threading.Timer(0.02, answer, (kept,)).start()  # another thread runs meanwhile
        assert np.isnan(comm.combine_recv(missing="nan")).all(1).tolist() == [False, True, True]


def test_a_whole_reply_counts_after_recover_too(tmp_path: Path) -> None:
    server = small_expert(tmp_path)
    with small_attention(tmp_path) as comm:
        dispatch(comm, 0)
        answer(server)
        dispatch(comm, 1)
        server.close()
        until(lambda: last_states(comm) == {0: "left"}, within_s=WAIT_S)
        comm.recover(0)
        assert np.isfinite(comm.combine_recv(0)).all()
        assert comm.missing(1) == {0: [0, 1, 2]}


def test_recover_may_be_called_again_and_leaves_a_new_life_alone(tmp_path: Path) -> None:
    with small_expert(tmp_path) as old, small_attention(tmp_path) as comm:
        dispatch(comm)
        until(lambda: last_states(old) == {0: "live"}, within_s=WAIT_S)
        old.drop(0)
        with pytest.raises(m2n.PeerLost, match="expert rank 0 is lost"):
            comm.combine_recv()
        old.close()
        with small_expert(tmp_path) as new:
            comm.set_placement(ONE)
            until(lambda: last_states(new) == {0: "live"}, within_s=WAIT_S)
            for _ in range(2):
                comm.recover(0)
                assert last_states(comm) == last_states(new) == {0: "live"}
            with pytest.raises(m2n.PeerLost, match="rows of 3 tokens"):
                comm.combine_recv()
            comm.combine_recv(missing="nan")
            dispatch(comm)
            answer(new)
            assert np.isfinite(comm.combine_recv()).all()


@pytest.mark.parametrize("rows_only_here", [False, True])
def test_a_stopped_rank_is_dropped_and_learns_why(rows_only_here: bool, start: Any, tmp_path: Path) -> None:
    said = tmp_path / "said"
    process = start(bodies.expert_that_is_dropped, 1, TWO, str(said))
    late = config(timeout_s=0.2)
    with small_expert(tmp_path, TWO, 0) as kept, small_attention(tmp_path, TWO, config=late) as comm:
        until(said.exists, within_s=WAIT_S)
        os.kill(process.pid, signal.SIGSTOP)
        if rows_only_here:
            send(comm, *HERE)
            answer(kept)
            comm.combine_recv()
            with pytest.raises(m2n.Timeout, match=r"has not answered the last, empty message.*drop\(1\)"):
                send(comm, *HERE)
        else:
            dispatch(comm)
            answer(kept)
            with pytest.raises(m2n.Timeout, match=r"expert rank 1 is alive but has not replied.*drop\(1\)"):
                comm.combine_recv()
        comm.drop(1, reason="it hangs\x1b[2J")
        comm.check()  # the caller knows
        if not rows_only_here:
            with pytest.raises(m2n.PeerLost, match="this rank dropped it: it hangs"):
                comm.combine_recv()
            comm.combine_recv(missing="nan")
        send(comm, *HERE)
        answer(kept)
        assert np.isfinite(comm.combine_recv()).all()
        comm.drop(1)  # it is gone: nothing changes
        os.kill(process.pid, signal.SIGCONT)
        process.join(SOON_S)
    assert said.read_text() == (
        "dispatch_recv: attention rank 0 is lost: it dropped this link: it hangs?[2J; "
        "call recover(0) to go on without it"
    )


def test_an_expert_rank_drops_an_attention_rank(tmp_path: Path) -> None:
    with (
        small_expert(tmp_path) as server,
        small_attention(tmp_path) as comm,
        small_attention(tmp_path, rank=1) as other,
    ):
        dispatch(comm)
        until(lambda: last_states(server) == {0: "live", 1: "live"}, within_s=WAIT_S)
        server.drop(0, "too many requests")
        server.check()
        assert server.peers()[0].cause == "this rank dropped it: too many requests"
        assert server.dispatch_recv(timeout=0.02) is None  # nothing of it is served
        with pytest.raises(m2n.PeerLost, match="expert rank 0 is lost: it dropped this link: too many requests"):
            comm.combine_recv()
        dispatch(other)
        answer(server)
        assert np.isfinite(other.combine_recv()).all()


@on_both
def test_nobody_waits_for_a_rank_that_hosts_nothing(device: str, tmp_path: Path) -> None:
    nothing_on_1 = m2n.Placement(FIRST.ranks_of_expert, num_expert_ranks=2)
    placed = nothing_on_1 if device != "cpu" else TWO
    late = config(timeout_s=SOON_S)
    with (
        small_expert(tmp_path, FIRST, 0, device=device) as server,
        small_expert(tmp_path, placed, 1, device=device) as silent,
    ):
        with small_attention(tmp_path, placed, config=late, device=device) as comm:
            if device == "cpu":
                send(comm, *HERE)
                answer(server)
                comm.combine_recv()
                comm.set_placement(FIRST)
            began = time.monotonic()
            for _ in range(3):
                for microbatch in (0, 1):
                    dispatch(comm, microbatch)
                    answer(server)
                    assert np.isfinite(comm.combine_recv(microbatch)).all()
            assert time.monotonic() - began < SOON_S
            # Where its slot was free it has heard of it all the same.
            until(lambda: silent.placement_versions() == {0: 1 if device == "cpu" else 0}, within_s=WAIT_S)
            # It may get rows of ready-made splits, and is waited for then.
            if device == "cpu":
                route = m2n.Route.from_splits([0, 3], IDS, WEIGHTS, shape=SMALL)
                comm.set_timeout(0.05)
                with pytest.raises(m2n.Timeout, match="expert rank 1 has not answered the last, empty message"):
                    comm.dispatch_send(X, route)


def test_a_comm_gives_up_a_rank_that_owes_a_reply(tmp_path: Path) -> None:
    with small_expert(tmp_path, TWO, 0) as kept, small_expert(tmp_path, TWO, 1) as silent:
        with small_attention(tmp_path, TWO, config=config(give_up_s=0.1)) as comm:
            dispatch(comm)
            answer(kept)
            with pytest.raises(m2n.Timeout):  # not before
                comm.combine_recv(timeout=0.01)
            began = time.monotonic()
            with pytest.raises(m2n.PeerLost, match=r"alive but did not answer attention rank 0 for 0.1 s") as caught:
                comm.combine_recv()
            assert time.monotonic() - began < SOON_S and caught.value.missing == {1: [1, 2]}
            with pytest.raises(m2n.PeerLost):
                comm.check()  # the caller is told, and has to say that it knows
            comm.recover(1)
            comm.check()
            with pytest.raises(m2n.PeerLost, match=r"it dropped this link: expert rank 1 was alive but did not answer"):
                silent.dispatch_recv(timeout=SOON_S) and silent.dispatch_recv(timeout=SOON_S)


def test_a_comm_gives_up_a_rank_that_owes_the_answer_to_an_empty_message(tmp_path: Path) -> None:
    with small_expert(tmp_path, TWO, 0) as kept, small_expert(tmp_path, TWO, 1):
        with small_attention(tmp_path, TWO, config=config(give_up_s=0.1)) as comm:
            for _ in range(3):
                send(comm, *HERE)
                answer(kept)
                assert np.isfinite(comm.combine_recv()).all()
            with pytest.raises(m2n.PeerLost, match="expert rank 1 is lost.* did not answer attention rank 0 for 0.1 s"):
                comm.check()


@on_both
def test_an_expert_rank_in_lockstep_gives_up_who_does_not_send(device: str, tmp_path: Path) -> None:
    with small_expert(tmp_path, device=device, config=config(give_up_s=0.1)) as server:
        with (
            small_attention(tmp_path, device=device) as comm,
            small_attention(tmp_path, rank=1, device=device) as silent,
        ):
            until(lambda: last_states(server) == {0: "live", 1: "live"}, within_s=WAIT_S)
            assert strictly(server, [0, 1], timeout=0.2) is None  # nobody has sent: nobody is late
            dispatch(comm)
            with pytest.raises(m2n.PeerLost, match="attention rank 1 .*did not answer expert rank 0 for 0.1 s"):
                strictly(server, [0, 1])
            server.recover(1)
            reply(server, strictly(server, [0]))
            assert np.isfinite(comm.combine_recv()).all()
            until(lambda: "did not answer expert rank 0" in silent.peers()[0].cause, within_s=WAIT_S)


@on_both
def test_a_message_that_came_whole_before_its_sender_left_counts(device: str, tmp_path: Path) -> None:
    with small_expert(tmp_path, device=device) as server, small_attention(tmp_path, rank=0, device=device) as comm:
        other = small_attention(tmp_path, rank=1, device=device)
        dispatch(comm)
        dispatch(other)
        other.close()
        until(lambda: last_states(server).get(1) == "left", within_s=WAIT_S)
        batch = strictly(server, [0, 1])
        assert batch.peers == [0, 1]
        reply(server, batch)
        assert np.isfinite(comm.combine_recv()).all()
        # What the errors say holds: take it off, or recover and take it off.
        for _ in range(2):
            words = "attention rank 1 has left: it closed its comm(, and it was given up)?; take it off attention_ranks"
            with pytest.raises(m2n.PeerLost, match=words) as caught:
                strictly(server, [0, 1])
            assert caught.value.peer == 1
            server.recover(1)
        dispatch(comm)
        reply(server, strictly(server, [0]))
        assert np.isfinite(comm.combine_recv()).all()


@on_both
def test_a_message_of_a_dead_process_counts_until_it_is_given_up(
    device: str, start: Any, transport: str, tmp_path: Path
) -> None:
    with small_expert(tmp_path, device=device) as server:
        # What is under way over a network when a process is killed may be lost with it.
        to_do = "die" if transport == "auto" else "hold"
        processes = [start(bodies.attention_main, rank, ONE, to_do) for rank in (3, 4)]
        if to_do == "hold":
            until(
                lambda: server.wait_work(0.01) is not None and server.stats()["messages_received"] == 2, within_s=WAIT_S
            )
            for process in processes:
                process.kill()
        until(lambda: last_states(server) == {3: "lost", 4: "lost"}, within_s=WAIT_S)
        reply(server, strictly(server, [3]))
        for _ in range(2):
            with pytest.raises(m2n.PeerLost, match="attention rank [34] is lost: its process died"):
                strictly(server, [3])
        for rank in (3, 4):
            server.recover(rank)
        assert server.dispatch_recv(timeout=0.05) is None
        with pytest.raises(m2n.PeerLost, match="attention rank 4 .*died, and it was given up; take it off"):
            strictly(server, [4])


def test_a_displaced_process_learns_that_another_one_took_its_place(start: Any, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server:
        with small_attention(tmp_path) as old:
            start(bodies.attention_main, 0, ONE, "hold")
            until(lambda: last_states(old) == {0: "lost"}, within_s=WAIT_S)
            with pytest.raises(m2n.PeerLost, match="it dropped this link: .*attention rank 0"):
                dispatch(old)
        assert server.peers()[0].cause == "a newer life of the same rank has joined"


def test_serving_goes_on_while_a_rank_has_a_life(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server:
        served = threading.Thread(target=serve, args=(server, 2, lambda batch: batch.x[batch.row_index_by_expert]))
        served.start()
        first, other = small_attention(tmp_path), small_attention(tmp_path, rank=1)
        first.close()
        first = small_attention(tmp_path)
        other.close()
        until(lambda: [peer.state for peer in server.peers()].count("left") == 2, within_s=WAIT_S)
        served.join(0.5)  # longer than one of its looks
        assert served.is_alive()
        dispatch(first)
        assert np.isfinite(first.combine_recv()).all()
        first.close()
        served.join(SOON_S)
        assert not served.is_alive()
