# SPDX-License-Identifier: Apache-2.0
"""Loss, lateness, and the end of things: the right error at the right side, in time, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import psutil
import pytest
from bodies import ONE, SMALL, small_attention, small_expert
from conftest import Leftovers, over
from processes import program
from small_case import IDS, TWO, WEIGHTS, X, answer, dispatch, start
from waits import SOON_S

import m2n
from m2n import _C
from m2n.ranks import run_ranks
from m2n.testing import expert_outputs

__all__ = ["start"]
pytestmark = over("auto", "tcp", "ucx")


def test_killed_expert_process_is_peer_lost_and_the_others_go_on(start: Any, tmp_path: Path) -> None:
    start(bodies.expert_main, 1, TWO, "die")
    with small_expert(tmp_path, TWO, 0) as survivor, small_attention(tmp_path, TWO) as comm:
        dispatch(comm)
        answer(survivor)
        began = time.monotonic()
        with pytest.raises(m2n.PeerLost, match="expert rank 1 is lost: its process died") as caught:
            comm.combine_recv()
        assert time.monotonic() - began < SOON_S and caught.value.peer == 1
        with pytest.raises(m2n.PeerLost, match="expert rank 1"):
            comm.check()
        with pytest.raises(m2n.PeerLost):  # a failed wait changes nothing
            comm.combine_recv()
        comm.recover(1)
        comm.check()
        with pytest.raises(m2n.PeerLost, match=r"it was given up; rows of 2 tokens \(1, 2\)") as caught:
            comm.combine_recv()  # until the caller asks for what is there
        assert caught.value.missing == comm.missing() == {1: [1, 2]}
        y = comm.combine_recv(missing="nan")
        assert np.isfinite(y[0]).all()  # experts 0 and 1 live on rank 0
        assert np.isnan(y[1]).all() and np.isnan(y[2]).all()  # never silently without the lost share
        with pytest.raises(m2n.PeerLost, match="expert rank 1"):
            dispatch(comm)
        comm.dispatch_send(X[:1], comm.route(IDS[:1], WEIGHTS[:1]))
        answer(survivor)
        assert np.isfinite(comm.combine_recv()).all()


def test_a_complete_reply_of_a_dead_peer_counts(start: Any, tmp_path: Path) -> None:
    process = start(bodies.expert_main, 0, ONE, "answer_and_die")
    with small_attention(tmp_path) as comm:
        dispatch(comm)
        process.join()
        while comm.peers()[0].state == "live":
            time.sleep(0.01)
        assert np.isfinite(comm.combine_recv()).all()
        with pytest.raises(m2n.PeerLost):
            dispatch(comm)


def test_killed_attention_process_is_peer_lost_and_the_others_are_served(start: Any, tmp_path: Path) -> None:
    with small_expert(tmp_path) as comm:
        process = start(bodies.attention_main, 7, ONE, "hold")
        batch = comm.dispatch_recv()
        process.kill()
        began = time.monotonic()
        with pytest.raises(m2n.PeerLost, match="attention rank 7 is lost"):
            comm.dispatch_recv()
        assert time.monotonic() - began < SOON_S
        comm.combine_send(batch, batch.gather())  # into memory that is still mapped: harmless
        comm.recover(7)
        with small_attention(tmp_path) as other:
            dispatch(other)
            answer(comm)
            assert np.isfinite(other.combine_recv()).all()


def test_strict_lockstep_ends_when_a_listed_rank_dies(start: Any, tmp_path: Path) -> None:
    with small_expert(tmp_path) as comm:
        start(bodies.attention_main, 1, ONE, "die")
        with pytest.raises(m2n.PeerLost, match="attention rank 1"):
            comm.dispatch_recv(linger_us=None, attention_ranks=[0, 1])


def test_a_stopped_launcher_of_children_leaves_no_orphan_link(start: Any, tmp_path: Path) -> None:
    """A forked child holds the dead rank's socket open: the pidfd tells all the same."""
    with small_expert(tmp_path) as comm:
        code = (
            "import os, sys, time, bodies\n"
            "comm = bodies.small_attention(sys.argv[1])\n"
            "child = os.fork()\n"
            "if child == 0: time.sleep(30); os._exit(0)\n"
            "print(child, flush=True); os.kill(os.getpid(), 9)\n"
        )
        process = subprocess.Popen(
            program(code, tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(m2n.PeerLost, match="its process died"):
                comm.dispatch_recv()
        finally:
            os.kill(child, 9)
            process.wait()


def test_the_verdict_on_a_lost_rank_is_kept(tmp_path: Path) -> None:
    """A rank that is cut off may still be alive: what it writes after it was found gone does not count."""
    with (
        small_expert(tmp_path, TWO, 0) as kept,
        small_expert(tmp_path, TWO, 1) as cut,
        small_attention(tmp_path, TWO) as comm,
    ):
        dispatch(comm)
        batch = cut.dispatch_recv()
        cut._native.drop_peer(0)
        assert comm.wait_ready([0], timeout=SOON_S) == 0  # gone, so that combine_recv would raise
        cut.combine_send(batch, expert_outputs(batch, TWO.experts_of(1)))
        answer(kept)
        with pytest.raises(m2n.PeerLost, match="expert rank 1 is lost"):
            comm.combine_recv()
        comm.recover(1)
        assert np.isnan(comm.combine_recv(missing="nan")).all(1).tolist() == [False, True, True]


def test_leaving_is_no_loss_unless_a_reply_is_owed(tmp_path: Path) -> None:
    server = small_expert(tmp_path)
    with small_attention(tmp_path) as comm:
        dispatch(comm)
        answer(server)
        comm.combine_recv()
        dispatch(comm)
        server.close()
        with pytest.raises(m2n.PeerLost, match="expert rank 0 has left"):
            comm.combine_recv()
        comm.check()  # leaving is not a loss
        assert comm.peers()[0].state == "left"


def test_an_attention_rank_that_left_is_not_an_error(tmp_path: Path) -> None:
    with small_expert(tmp_path) as comm:
        with small_attention(tmp_path) as other:
            dispatch(other)
        # It may have come and gone before this side made the link live.
        while not comm.peers() or comm.peers()[0].state == "live":
            time.sleep(0.01)
        answer(comm)  # a message that came whole counts; the reply goes nowhere
        assert comm.dispatch_recv(timeout=0.05) is None
        comm.check()


def test_a_late_peer_is_a_timeout_and_the_call_can_be_repeated(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        dispatch(comm)
        with pytest.raises(m2n.Timeout, match="expert rank 0 is alive but has not replied") as caught:
            comm.combine_recv(timeout=0.05)
        assert caught.value.peer == 0
        answer(server)
        assert np.isfinite(comm.combine_recv()).all()


def test_strict_lockstep_names_who_is_late(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path, rank=0) as comm, small_attention(tmp_path, rank=1):
        dispatch(comm)
        with pytest.raises(m2n.Timeout, match="attention rank 1 has not dispatched"):
            server.dispatch_recv(linger_us=None, attention_ranks=[0, 1], timeout=0.1)
        assert server.dispatch_recv(linger_us=None, attention_ranks=[0]).peers == [0]


def test_an_unanswered_empty_message_is_a_timeout_of_the_next_dispatch(tmp_path: Path) -> None:
    config = dataclasses.replace(bodies.NUMPY, timeout_s=0.2)
    with small_expert(tmp_path), m2n.AttentionComm(0, SMALL, ONE, tmp_path, config=config) as comm:
        comm.dispatch_send(X[:0], comm.route(IDS[:0], WEIGHTS[:0]))
        assert comm.combine_recv().shape == (0, 64)  # not awaited here
        with pytest.raises(m2n.Timeout, match="has not answered the last, empty message"):
            dispatch(comm)


def test_an_expert_that_is_not_hosted_is_refused_by_name(tmp_path: Path) -> None:
    """Two sides with different placements: until failover exists, a refusal is an error, and the slot is free again."""
    wrong = m2n.Placement([[0], [0], [0], [1]])
    with (
        small_expert(tmp_path, wrong, 0) as server,
        small_expert(tmp_path, wrong, 1) as other,
        small_attention(tmp_path, TWO) as comm,
    ):
        dispatch(comm)  # thinks that expert 2 is on rank 1
        threads = [threading.Thread(target=c.dispatch_recv, kwargs={"timeout": 1.0}) for c in (other,)]
        for thread in threads:
            thread.start()
        answer(server)
        with pytest.raises(m2n.ProtocolError, match="expert rank 1 does not host expert 2") as caught:
            comm.combine_recv()
        assert caught.value.peer == 1
        for thread in threads:
            thread.join()
        comm.dispatch_send(X[:1], comm.route(IDS[:1], WEIGHTS[:1]))
        answer(server)
        assert np.isfinite(comm.combine_recv()).all()


def test_closing_ends_a_wait_in_another_thread(tmp_path: Path) -> None:
    comm = small_expert(tmp_path)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            comm.dispatch_recv(timeout=30)
        except m2n.Error as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    comm.close()
    thread.join(SOON_S)
    assert isinstance(errors[0], m2n.SetupError) and "closed" in str(errors[0])
    with pytest.raises(m2n.SetupError, match="closed"):
        comm.dispatch_recv()
    comm.close()  # twice is no error


def test_a_peer_that_joins_a_comm_that_closes_meanwhile_hears_the_goodbye() -> None:
    native = _C.ExpertComm(SMALL._native(), 0, 1, "shm", [0])
    for fd, _ in native.offer(0, 1)["objects"]:
        os.close(fd)
    native.close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        native.watch(0, ours.detach(), -1, 0, 0)
        theirs.settimeout(SOON_S)
        assert theirs.recv(1) == b"G" and theirs.recv(1) == b""


def test_views_outlive_the_comm(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        dispatch(comm)
        batch = server.dispatch_recv()
        window, index = batch.x, batch.row_index_by_expert
    del batch, server, comm
    gc.collect()
    assert np.array_equal(window[index[0]], X[0])


def test_use_after_fork_is_refused_and_says_no_goodbye(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                dispatch(comm)
            except m2n.SetupError as error:
                status = 0 if "fork" in str(error) else 2
            comm.close()
            server.close()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with small_attention(tmp_path, rank=1):  # the child's close() did not close the parent's door
            pass
        dispatch(comm)
        answer(server)
        assert np.isfinite(comm.combine_recv()).all()


def test_ctrl_c_ends_a_wait(tmp_path: Path) -> None:
    code = (
        "import signal, sys, bodies\n"
        # A shell starts what runs in its background with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "comm = bodies.small_expert(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "comm.dispatch_recv(timeout=60)\n"
    )
    process = subprocess.Popen(
        program(code, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=SOON_S)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors and process.returncode != 0


def test_a_new_life_of_a_rank_replaces_the_old_one(start: Any, tmp_path: Path) -> None:
    with small_expert(tmp_path) as comm:
        start(bodies.attention_main, 0, ONE, "hold")
        assert comm.wait_peer(0)
        with small_attention(tmp_path) as newer:  # the old process is still there
            while comm.peers()[0].state == "live":
                time.sleep(0.01)
            assert [peer.cause for peer in comm.peers()][0] == "a newer life of the same rank has joined"
            comm.check()
            dispatch(newer)
            answer(comm)
            assert np.isfinite(newer.combine_recv()).all()


def open_files() -> list[str]:
    """What this process holds open, by kind; the spawn context's own pipes are not ours."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name.split(":[")[0] for name in names if not name.startswith("pipe:"))


def test_nothing_is_left_behind(start: Any, tmp_path: Path) -> None:
    """No descriptor, mapping, shared-memory name or abstract socket, whether ranks close or are killed."""
    run_ranks(bodies.pair([[]]), 1, 1, shape=SMALL, config=bodies.NUMPY)  # the watcher's own descriptors stay
    gc.collect()
    files_before, shared_memory = open_files(), Leftovers()
    with small_expert(tmp_path) as comm:
        address = json.loads(next(tmp_path.iterdir()).read_text())["address"]
        assert f"@{address}" in Path("/proc/net/unix").read_text()
        process = start(bodies.attention_main, 0, ONE, "die")
        process.join()
        with contextlib.suppress(m2n.PeerLost):  # its message may or may not be seen before its death
            answer(comm)
    del comm
    gc.collect()
    assert open_files() == files_before
    assert "memfd:m2n" not in Path("/proc/self/maps").read_text()
    assert not shared_memory.names_that_stay()
    assert f"@{address}" not in Path("/proc/net/unix").read_text()
    assert not [child for child in psutil.Process().children() if "bodies" in " ".join(child.cmdline())]
