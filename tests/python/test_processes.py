# SPDX-License-Identifier: Apache-2.0
"""Ranks and processes: how they are started, forked and orphaned, and what outlives what."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import pickle
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import psutil
import pytest
from bodies import NEAR_THE_END, NUMPY, ONE, SMALL, small_answer, small_attention, small_dispatch, small_expert
from oracle import SHAPE, all_kinds, are_equal, oracles, to_numpy
from processes import fork, program, run_body
from waits import WAIT_S, until

import m2n
from m2n import testing
from m2n.ranks import run_ranks, serve

# How processes are started


@pytest.mark.parametrize("method, first_seq", [("spawn", NEAR_THE_END), ("forkserver", 0), ("fork", 0)])
def test_ranks_are_made_in_children_of_any_start_method(method: str, first_seq: int, tmp_path: Path) -> None:
    """With spawn also: message numbers wrap between processes, as between threads."""
    workloads = all_kinds(SHAPE, 2)
    given = (SHAPE, m2n.Placement.block(8, 2), [list(map(to_numpy, layers)) * 2 for layers in workloads])
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    run_body("launch", tmp_path, method, first_seq)
    results = pickle.loads((tmp_path / "results").read_bytes())
    for rank, expected in enumerate(oracles(workloads, SHAPE, given[1])):
        assert are_equal(results["attention", rank], expected * 2)


X = np.ones((8, 64), np.float32)
# (attention comm, expert comm, a batch that waits for its answer) -> a use of one of them.
USES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "dispatch_send": lambda comm, server, batch: small_dispatch(comm, 1),
    "dispatch_send to a busy slot": lambda comm, server, batch: small_dispatch(comm, 0),
    "combine_recv": lambda comm, server, batch: comm.combine_recv(0),
    "combine_recv of a free slot": lambda comm, server, batch: comm.combine_recv(1),
    "ready": lambda comm, server, batch: comm.ready(0),
    "ready of a free slot": lambda comm, server, batch: comm.ready(1),
    "wait_ready": lambda comm, server, batch: comm.wait_ready([0]),
    "wait_ready for nothing": lambda comm, server, batch: comm.wait_ready([], timeout=0.2),
    "idle": lambda comm, server, batch: comm.idle(),
    "check": lambda comm, server, batch: comm.check(),
    "recover": lambda comm, server, batch: comm.recover(0),
    "dispatch_recv": lambda comm, server, batch: server.dispatch_recv(),
    "dispatch_recv as a poll": lambda comm, server, batch: server.dispatch_recv(timeout=0),
    "dispatch_recv in lockstep": lambda comm, server, batch: server.dispatch_recv(linger_us=None, attention_ranks=[0]),
    "wait_work": lambda comm, server, batch: server.wait_work(0.2),
    "combine_send": lambda comm, server, batch: server.combine_send(batch, np.ones((16, 64), np.float32)),
    "combine_send reduced": lambda comm, server, batch: server.combine_send(batch, X, reduced=True),
    "wait_peer that is there": lambda comm, server, batch: server.wait_peer(0),
    "wait_peer that is not": lambda comm, server, batch: server.wait_peer(5, timeout=0.2),
    "expert's check": lambda comm, server, batch: server.check(),
    "expert's recover": lambda comm, server, batch: server.recover(0),
    "batch.x": lambda comm, server, batch: batch.x.sum(),
    "batch.gather": lambda comm, server, batch: batch.gather(),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_after_fork_is_refused(use: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm)
        batch = server.dispatch_recv()
        end = fork(lambda: USES[use](comm, server, batch))()
        assert end.startswith("SetupError: ") and "before fork()" in end, end
        server.combine_send(batch, testing.expert_outputs(batch, range(4)))
        assert np.array_equal(comm.combine_recv(), expected)


def test_what_needs_no_peer_works_after_fork(tmp_path: Path) -> None:
    """A child may look: routes, counters, and the lists of a batch are in memory of its own."""
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        small_dispatch(comm)
        batch = server.dispatch_recv()

        def look() -> Any:
            route = comm.route(np.array([[0, 1]], np.int32), np.ones((1, 2), np.float32))
            return route.num_rows, comm.peers()[0].state, server.stats()["rows_received"], float(batch.weights.sum())

        assert fork(look)() == "returned (1, 'live', 8, 8.0)"


def test_a_child_that_drops_or_ends_with_its_parents_comms_says_no_goodbye(tmp_path: Path) -> None:
    held = [small_expert(tmp_path), small_attention(tmp_path)]

    def drop() -> int:
        held.clear()
        return gc.collect()

    assert fork(drop)().startswith("returned")
    server, comm = held
    with server, comm:
        expected = small_dispatch(comm)
        assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)
        assert [peer.state for peer in (*comm.peers(), *server.peers())] == ["live", "live"]
    run_body("child_that_ends_by_itself", tmp_path / "other")


def test_a_forked_child_may_open_a_rank_of_its_own(tmp_path: Path) -> None:
    """While the parent's comms are open: two children join the parent's rank, one makes a pair of its own."""
    workloads = all_kinds(SMALL, 3)
    given = [list(map(to_numpy, layers)) for layers in workloads]
    expected = oracles(workloads, SMALL, ONE)

    def as_rank(rank: int) -> Callable[[], str]:
        return lambda: str(
            are_equal(bodies.run_rank("attention", rank, str(tmp_path), SMALL, ONE, given), expected[rank])
        )

    def own_pair() -> str:
        with small_expert(tmp_path, name="child") as server, small_attention(tmp_path, name="child") as comm:
            y = small_dispatch(comm)
            return str(small_answer(server) and np.array_equal(comm.combine_recv(), y))

    # The parent has a rank of the name that a child opens, with another store.
    with small_expert(tmp_path / "parent", name="child"), small_expert(tmp_path) as server:
        with ThreadPoolExecutor(1) as pool, small_attention(tmp_path) as comm:
            ends = [fork(as_rank(1)), fork(as_rank(2)), fork(own_pair)]
            served = pool.submit(bodies.answer, server, 3)
            assert are_equal(bodies.exchange(comm, given), expected[0])
            assert [end() for end in ends] == ["returned 'True'"] * 3
            comm.close()
            assert served.result(WAIT_S) > 0


def test_a_fork_under_busy_threads_leaves_the_child_no_locked_lock(tmp_path: Path) -> None:
    """Whatever the parent's other threads are in the middle of, a child can still be refused, and close."""
    shape = m2n.Shape(64, 64, 8, max_tokens=512, dispatch_dtype="float32", combine_dtype="float32")
    ids, x = np.tile(np.arange(8, dtype=np.int32), (512, 1)), np.ones((512, 64), np.float32)
    ended = threading.Event()

    def attend(comm: m2n.AttentionComm) -> None:
        route = comm.route(ids, np.ones(ids.shape, np.float32))
        while not ended.is_set():
            comm.dispatch_send(x, route)
            comm.combine_recv()

    def answer_many(comm: m2n.ExpertComm) -> None:
        def use() -> None:
            with contextlib.suppress(m2n.SetupError):
                comm.recover(0)
            comm.close()

        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(serve, comm, 1, lambda batch: np.ones((batch.num_pairs, 64), np.float32))
            try:
                for _ in range(60):
                    assert fork(use)() == "returned None"
            finally:
                ended.set()
            served.result(WAIT_S)

    run_ranks((attend, answer_many), 1, 1, shape=shape, config=NUMPY)


# The end of things


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_views_stay_readable_and_the_memory_goes_with_the_last(library: str, tmp_path: Path) -> None:
    run_body("views_outlive_everything", tmp_path, library)


def test_ranks_outlive_their_launcher_and_its_peer_learns_of_the_loss(tmp_path: Path) -> None:
    code = "import sys, bodies; bodies.launcher_to_be_killed(sys.argv[1])"
    launcher = subprocess.Popen(program(code, tmp_path), stdout=subprocess.PIPE)
    children: list[psutil.Process] = []
    try:
        with launcher:
            assert launcher.stdout is not None
            children = [psutil.Process(int(launcher.stdout.readline())) for _ in range(3)]
            until((tmp_path / "exchanging").exists, "an exchange between the children", within_s=WAIT_S)
            until((tmp_path / "received").exists, "a message to the launcher", within_s=WAIT_S)
            launcher.kill()
        assert psutil.wait_procs(children, timeout=WAIT_S)[1] == []
    finally:
        launcher.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    assert (tmp_path / "siblings-expert").read_text() == (tmp_path / "siblings-attention").read_text() == "ended"
    assert "expert rank 0 is lost: its process died" in (tmp_path / "with_parent-attention").read_text()


def test_the_loss_of_a_link_is_the_loss_of_that_link(tmp_path: Path) -> None:
    """48 of 64 attention ranks go on when the process of the other 16 is killed; each of these is told of by itself."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=bodies.many_attention_ranks, args=(str(tmp_path), 48, 63, ready))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(small_expert(tmp_path, max_peers=64))
        comms = [stack.enter_context(small_attention(tmp_path, rank=rank)) for rank in range(48)]
        process.start()
        try:
            assert ready.wait(WAIT_S)
            expected = [small_dispatch(comm) for comm in comms]
        finally:
            process.kill()
            process.join()
        until(
            lambda: sum(peer.state == "lost" for peer in server.peers()) == 16, "the loss of 16 links", within_s=WAIT_S
        )
        lost = []
        while len(lost) < 16:
            try:
                assert small_answer(server)
            except m2n.PeerLost as error:
                lost.append(error.peer)
                server.recover(error.peer)
        server.check()
        assert sorted(lost) == list(range(48, 64))
        assert {peer.rank for peer in server.peers() if peer.state == "live"} == set(range(48))
        for _ in range(2):
            while small_answer(server, timeout=0.1):
                pass
            for comm, y in zip(comms, expected):
                comm.check()
                assert np.array_equal(comm.combine_recv(), y)
            expected = [small_dispatch(comm) for comm in comms]
