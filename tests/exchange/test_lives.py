# SPDX-License-Identifier: Apache-2.0
"""Lives of a rank come and go: what a gone one had is given back, and its peer index serves the next."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import ONE, small_attention, small_expert
from conftest import over
from small_case import IDS, WEIGHTS, X, answer, dispatch
from waits import SOON_S, until

import m2n
from m2n.testing import expert_outputs, serve

pytestmark = over("auto", "ucx")
context = multiprocessing.get_context("spawn")


def objects_mapped() -> list[tuple[int, int]]:
    """(address, bytes) of each memory object of m2n that this process has mapped, its own and those of peers."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:m2n" in line:
            begin, end = (int(word, 16) for word in line.split()[0].split("-"))
            found.append((begin, end - begin))
    return found


def exchange(comm: m2n.AttentionComm, server: m2n.ExpertComm) -> np.ndarray:
    dispatch(comm)
    answer(server)
    y: np.ndarray = comm.combine_recv(timeout=SOON_S)
    return y


def test_a_rank_comes_back_more_often_than_there_are_peer_indices(tmp_path: Path) -> None:
    with small_expert(tmp_path, max_peers=2) as server:
        for life in range(9):
            with small_attention(tmp_path, max_peers=1) as comm:
                exchange(comm, server)
                assert [peer.state for peer in server.peers()] == ["left"] * life + ["live"]
            until(lambda: server.peers()[-1].state == "left")
        assert len({peer.life for peer in server.peers()}) == 9  # what was is another thing than what may come


def test_an_expert_rank_comes_back_more_often_than_there_are_peer_indices(tmp_path: Path) -> None:
    first = small_expert(tmp_path)
    with small_attention(tmp_path, max_peers=1) as comm:
        expected = exchange(comm, first)
        first.close()
        for _ in range(5):
            until(lambda: comm.peers()[-1].state == "left")
            with small_expert(tmp_path) as server:
                comm.set_placement(ONE, timeout=SOON_S)
                assert np.array_equal(exchange(comm, server), expected)
        assert len(comm.peers()) == 6


def dispatch_and_stay(store: Path) -> None:
    comm = small_attention(store)
    dispatch(comm)
    time.sleep(60)


def test_an_older_life_whose_batch_is_held_is_not_lost_again_once_a_newer_one_has_left(tmp_path: Path) -> None:
    child = context.Process(target=dispatch_and_stay, args=(tmp_path,))
    child.start()
    with small_expert(tmp_path) as server:
        batch = server.dispatch_recv(timeout=60)
        child.kill()  # once its message is here
        child.join()
        small_attention(tmp_path).close()  # its next life
        until(lambda: server.peers()[-1].state == "left")
        assert server.dispatch_recv(timeout=0) is None  # looks for indices to give back
        server.check()
        server.combine_send(batch, expert_outputs(batch, range(4)))


def test_the_memory_of_a_life_that_is_gone_goes_back(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server:
        before = set(objects_mapped())  # those of earlier tests too, which may still go
        for _ in range(3):
            with small_attention(tmp_path) as comm:
                exchange(comm, server)
                assert set(objects_mapped()) - before
            until(lambda: server.peers()[-1].state == "left")
            del comm
            gc.collect()
            assert server.dispatch_recv(timeout=0) is None  # whoever is in a verb gives it back
            assert not set(objects_mapped()) - before


def test_rows_that_are_not_answered_stay_though_their_rank_has_left(tmp_path: Path) -> None:
    with small_expert(tmp_path, max_peers=1) as server:
        with small_attention(tmp_path) as comm:
            dispatch(comm)
            batch = server.dispatch_recv(timeout=SOON_S)
            assert batch is not None
        del comm
        until(lambda: server.peers()[0].state == "left")
        with pytest.raises(m2n.SetupError, match="max_peers=1 peer indices in use, 1 by peers that are gone but sent"):
            small_attention(tmp_path)
        assert np.array_equal(batch.x[batch.row_index_by_expert], X[[0, 2, 0, 1, 1, 2]])
        server.combine_send(batch, expert_outputs(batch, batch.experts))
        with small_attention(tmp_path) as comm:
            exchange(comm, server)


def test_a_batch_that_nobody_will_answer_keeps_nothing(tmp_path: Path) -> None:
    with small_expert(tmp_path, max_peers=1) as server:
        with small_attention(tmp_path) as comm:
            dispatch(comm)
            batch = server.dispatch_recv(timeout=SOON_S)
            assert batch is not None
        until(lambda: server.peers()[0].state == "left")
        del batch, comm
        with small_attention(tmp_path) as comm:
            exchange(comm, server)


def test_an_index_of_a_lost_rank_is_free_once_the_caller_knows(tmp_path: Path) -> None:
    with small_expert(tmp_path, max_peers=1) as server:
        comm = small_attention(tmp_path)
        assert server.wait_peer(0, SOON_S)
        comm._native.drop_peer(0)
        until(lambda: server.peers()[0].state == "lost")
        comm.close()
        with pytest.raises(m2n.SetupError, match=r"1 by peers that are lost: call recover\(\) for each"):
            small_attention(tmp_path, rank=1)
        server.recover(0)
        with small_attention(tmp_path, rank=1) as other:
            exchange(other, server)


def test_of_two_overlapping_handshakes_of_a_rank_the_later_one_wins(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server:
        native = server._native
        older, newer = native.offer(0, 11), native.offer(0, 12)
        ends = [socket.socketpair() for _ in range(4)]
        native.watch(newer["peer_idx"], ends[1][0].detach(), -1, 0.0, 0.0)
        with pytest.raises(m2n.SetupError, match="a newer link of attention rank 0 was made meanwhile"):
            native.watch(older["peer_idx"], ends[0][0].detach(), -1, 0.0, 0.0)
        native.withdraw(older["peer_idx"])
        assert [(peer.life, peer.state) for peer in server.peers()] == [(12, "live")]
        # Nor where the later one has ended meanwhile, and its index is free again.
        oldest, newest = native.offer(1, 21), native.offer(1, 22)
        native.watch(newest["peer_idx"], ends[2][0].detach(), -1, 0.0, 0.0)
        native.drop_peer(newest["peer_idx"])
        server.recover(1)
        with pytest.raises(m2n.SetupError, match="a newer link of attention rank 1 was made meanwhile"):
            native.watch(oldest["peer_idx"], ends[3][0].detach(), -1, 0.0, 0.0)
        native.withdraw(oldest["peer_idx"])
        for offer in (older, newer, oldest, newest):
            for fd, _ in offer["objects"]:
                if fd >= 0:
                    os.close(fd)


def test_a_link_whose_number_is_not_newer_is_refused(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server:
        native = server._native
        first = native.offer(0, 11)
        assert first["link"] == 1
        with pytest.raises(m2n.SetupError, match="wants to make its link 1 with expert rank 0, which has had 1"):
            native.offer(0, 11, link=1)
        native.withdraw(first["peer_idx"])  # it came to nothing, so it never was
        again = native.offer(0, 11, link=1)
        assert again["peer_idx"] == first["peer_idx"]
        for offer in (first, again):
            for fd, _ in offer["objects"]:
                if fd >= 0:
                    os.close(fd)


def test_a_life_on_an_emulated_device_gives_its_index_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "emulated", "max_peers": 2}
    with small_expert(tmp_path, **options) as server:
        for _ in range(5):
            with small_attention(tmp_path, **options) as comm:
                dispatch(comm)
                batch = server.dispatch_recv(timeout=SOON_S)
                assert batch is not None
                server.combine_send(batch, batch.gather())
                comm.combine_recv(timeout=SOON_S)
            until(lambda: server.peers()[-1].state == "left")


@pytest.mark.sanitize
def test_lives_come_and_go_while_others_exchange(tmp_path: Path) -> None:
    is_over = threading.Event()

    def answers(batch: m2n.Batch) -> np.ndarray:
        return expert_outputs(batch, batch.experts)

    def ask(comm: m2n.AttentionComm) -> np.ndarray:
        comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
        y: np.ndarray = comm.combine_recv(timeout=SOON_S)
        return y

    with small_expert(tmp_path, max_peers=3) as server, ThreadPoolExecutor(2) as pool:
        serving = pool.submit(serve, server, 2, answers, until=is_over.is_set)
        with small_attention(tmp_path) as steady:
            expected = ask(steady)

            def go_on() -> int:
                num_rounds = 0
                while not is_over.is_set():
                    assert np.array_equal(ask(steady), expected)
                    num_rounds += 1
                return num_rounds

            going_on = pool.submit(go_on)
            try:
                for _ in range(12):
                    with small_attention(tmp_path, rank=1) as comm:
                        assert np.array_equal(ask(comm), expected)
            finally:
                is_over.set()
            assert going_on.result(SOON_S) > 0
        serving.result(SOON_S)


def late_writer(store: str, connection: Connection) -> None:
    """An attention rank that writes where it may long after another life has taken its place."""
    comm = small_attention(Path(store))
    connection.send("joined")
    connection.recv()
    for address, num_bytes in objects_mapped():
        ctypes.memset(address, 0xFF, num_bytes)
    connection.send("written")
    connection.recv()
    comm.abort()


def test_late_writes_of_an_old_life_land_where_nobody_reads(tmp_path: Path, transport: str) -> None:
    if transport == "ucx":
        pytest.skip("nothing of the peer is mapped there: a message of an ended link is nobody's")
    ours, theirs = context.Pipe()
    process = context.Process(target=late_writer, args=(str(tmp_path), theirs))
    with small_expert(tmp_path, max_peers=2) as server:
        process.start()
        try:
            assert ours.poll(60)
            ours.recv()
            with small_attention(tmp_path):  # displaces it, at the second index
                pass
            until(lambda: [peer.state for peer in server.peers()][-1:] == ["left"])
            with small_attention(tmp_path) as comm:  # at the index that the process had
                expected = exchange(comm, server)
                dispatch(comm)
                ours.send("write")
                assert ours.poll(SOON_S) and ours.recv() == "written"
                answer(server)
                assert np.array_equal(comm.combine_recv(timeout=SOON_S), expected)
                assert np.array_equal(exchange(comm, server), expected)
        finally:
            ours.send("end")
            ours.close()  # ends it wherever it is
            process.join()


def resources() -> tuple[int, int, int]:
    """Resident KB, mappings, descriptors of this process."""
    gc.collect()
    resident_kb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return resident_kb, len(Path("/proc/self/maps").read_text().splitlines()), len(os.listdir("/proc/self/fd"))


RESTARTS = int(os.environ.get("M2N_TEST_RESTARTS", "500"))
TOLD_AT = (RESTARTS // 5, RESTARTS - 1)


def restart_attention(store: str, connection: Connection) -> None:
    """Attention rank 0 with many lives, which tells its resources twice."""
    for life in range(RESTARTS):
        with small_attention(Path(store)) as comm:
            comm.dispatch_send(X, comm.route(IDS, WEIGHTS))
            comm.combine_recv(timeout=SOON_S)
        if life in TOLD_AT:
            connection.send(resources())
            connection.recv()


def restart_expert(store: str, connection: Connection) -> None:
    """Likewise expert rank 0."""
    for life in range(RESTARTS):
        with small_expert(Path(store)) as server:
            answer(server)
            connection.recv()  # it is combined
        connection.send(resources() if life in TOLD_AT else None)


def serve_restarts(store: Path, connection: Connection) -> list[tuple[Any, Any]]:
    """As expert rank 0, which lives on: what both sides had, twice."""
    seen = []
    with small_expert(store, max_peers=2) as server:
        while len(seen) < 2:
            batch = server.dispatch_recv(timeout=0.05)
            if batch is not None:
                server.combine_send(batch, expert_outputs(batch, batch.experts))
            if connection.poll(0):
                seen.append((resources(), connection.recv()))
                connection.send("go on")
    return seen


def join_restarts(store: Path, connection: Connection) -> list[tuple[Any, Any]]:
    """As attention rank 0, which lives on."""
    seen = []
    with small_attention(store, max_peers=1) as comm:
        for life in range(RESTARTS):
            comm.set_placement(ONE, timeout=SOON_S)
            dispatch(comm)
            comm.combine_recv(timeout=SOON_S)
            connection.send("combined")
            peer = connection.recv()
            until(lambda: comm.peers()[-1].state == "left")
            if life in TOLD_AT:
                seen.append((resources(), peer))
    return seen


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("restarts", "lives_on"), [(restart_attention, serve_restarts), (restart_expert, join_restarts)]
)
def test_many_restarts_of_a_rank_leave_nothing_at_either_side(tmp_path: Path, restarts: Any, lives_on: Any) -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=restarts, args=(str(tmp_path), theirs), daemon=True)
    process.start()
    try:
        seen = lives_on(tmp_path, ours)
        process.join()
    finally:
        process.kill()
    print(
        f"{restarts.__name__}, {RESTARTS} lives: (KB, mappings, descriptors) of who lives on and who restarts: {seen}"
    )
    for before, after in zip(*seen):
        assert after[0] - before[0] < 4000  # allocators keep some, and peers() remembers
        assert after[1] - before[1] <= 8 and after[2] - before[2] <= 4
