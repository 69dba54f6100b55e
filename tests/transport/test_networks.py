# SPDX-License-Identifier: Apache-2.0
"""What holds over every network, sockets and UCX: large messages, idling, threads, and what a peer may send.

That they give the oracle's bits stands in `test_exchange.py`, what becomes of lost ranks in `test_faults.py`.
"""

from __future__ import annotations

import dataclasses
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from bodies import ONE, SMALL, small_answer, small_attention, small_dispatch, small_expert
from libraries import CXX
from oracle import drive_and_serve
from tiers import needs_compiler

import m2n
from m2n import testing

ROOT = Path(__file__).resolve().parents[2]
UCX = [pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "ucx-put")]
over_networks = pytest.mark.parametrize("transport", ["tcp", *UCX], indirect=True)
# Those whose messages need somebody at the receiver.
over_messages = pytest.mark.parametrize("transport", ["tcp", UCX[0]], indirect=True)


# What a peer can send


def run_sanitized(folder: Path, program: str, rounds: int, *sources: str) -> None:
    """Compiles tests/transport/<program>.cc with files of csrc/transport, with checks of every access, and runs it."""
    options = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [ROOT / f"tests/transport/{program}.cc", *(ROOT / f"csrc/transport/{source}.cc" for source in sources)]
    command = [CXX, *options, "-DM2N_HAS_CUDA=0", f"-I{ROOT / 'csrc'}", *files, "-o", folder / program, "-lpthread"]
    subprocess.run(command, check=True)
    done = subprocess.run([folder / program, "1", str(rounds)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@needs_compiler
def test_whatever_header_or_address_is_accepted_stays_within_its_objects(tmp_path: Path) -> None:
    run_sanitized(tmp_path, "network_messages", 100000, "network/message", "ucx/link_address")


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_compiler
def test_whatever_comes_over_a_socket_stays_within_its_objects_and_holds_up_nobody_else(tmp_path: Path) -> None:
    sources = ("tcp/links", "tcp/traffic", "network/areas", "network/links", "network/message", "memory_limit")
    run_sanitized(tmp_path, "tcp_garbage", 200, *sources)


# Exchanges


@over_networks
@pytest.mark.parametrize("num_tokens", [256, 2048])  # eager; and more than 512 KB, which UCX hands over by rendezvous
def test_large_messages_both_ways_from_scattered_rows(transport: str, num_tokens: int, tmp_path: Path) -> None:
    shape = m2n.Shape(512, 4, 2, num_tokens, 2, dispatch_dtype="float32", combine_dtype="float32")
    generator = np.random.default_rng(1)
    x = generator.standard_normal((2 * num_tokens, 512), np.float32)[::2]  # rows with others between
    ids = np.stack([generator.permutation(4)[:2] for _ in range(num_tokens)]).astype(np.int32)
    weights = np.full(ids.shape, 0.5, np.float32)
    options: dict[str, Any] = {"shape": shape, "placement": ONE, "store": tmp_path, "config": bodies.NUMPY}

    def serve(server: m2n.ExpertComm) -> None:
        for reduced in (False, True, True):
            batch = server.dispatch_recv()
            y = testing.expert_outputs(batch, range(4))
            if reduced:  # of one attention rank, in wire order: pairs of a row lie where the lists say
                rows = np.zeros((num_tokens, 512), np.float32)
                first = batch.row_index_by_expert.min()
                for position, row in enumerate(batch.row_index_by_expert - first):
                    rows[row] += batch.weights[position] * y[position]
                server.combine_send(batch, rows, reduced=True)
                rows[:] = -1  # it is the caller's again
            else:
                server.combine_send(batch, y)
                y[:] = -1

    with m2n.ExpertComm(0, **options) as server, m2n.AttentionComm(0, **options) as comm, ThreadPoolExecutor() as pool:
        served = pool.submit(serve, server)
        scale = {expert: np.float32(0.5 + 0.25 * (expert % 5)) for expert in range(4)}
        expected = sum(
            np.float32(0.5)
            * (x * np.take([scale[e] for e in range(4)], ids[:, k])[:, None] + 0.125 * ids[:, k][:, None])
            for k in range(2)
        )
        for microbatch in (0, 1, 0):
            comm.dispatch_send(x, comm.route(ids, weights), microbatch)
            assert np.allclose(comm.combine_recv(microbatch), expected, rtol=1e-5, atol=1e-5)
        served.result(20)


@over_networks
def test_several_threads_of_one_comm_drive_and_serve(transport: str) -> None:
    drive_and_serve(bodies.NUMPY)


@over_messages
def test_what_was_sent_arrives_while_its_sender_computes(transport: str, tmp_path: Path) -> None:
    """A message larger than what sockets hold: somebody other than the sender's thread must bring it on its way."""
    shape = m2n.Shape(4096, 4, 1, 8192, dispatch_dtype="float32", combine_dtype="float32")
    options: dict[str, Any] = {"shape": shape, "placement": ONE, "store": tmp_path, "config": bodies.NUMPY}
    x = np.ones((4096, 4096), np.float32)
    ids = np.zeros((4096, 1), np.int32)
    with m2n.ExpertComm(0, **options) as server, m2n.AttentionComm(0, **options) as comm:
        comm.dispatch_send(x, comm.route(ids, np.ones((4096, 1), np.float32)))
        batch = server.dispatch_recv()  # this thread waits here; nobody waits on the attention rank
        assert batch is not None and batch.num_rows == 4096 and batch.x[batch.row_index_by_expert[-1], -1] == 1


@over_messages
def test_ready_and_polls_make_progress_by_themselves(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm)
        deadline = time.monotonic() + 20
        while not small_answer(server, timeout=0):
            assert time.monotonic() < deadline
        while not comm.ready(0):
            assert time.monotonic() < deadline
        assert np.array_equal(comm.combine_recv(), expected)


@over_networks
def test_an_idle_pair_occupies_no_core(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm)
        assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)
        time.sleep(0.1)
        busy_s = time.process_time()
        time.sleep(1.0)  # nobody waits
        assert server.dispatch_recv(timeout=1.0) is None  # one waits
        assert time.process_time() - busy_s < 0.4


@over_messages
def test_a_waiting_thread_is_woken_by_what_another_one_finds(transport: str, tmp_path: Path) -> None:
    """Two threads of one comm sleep, for a message each; only one of them can sleep on the network."""
    shape = dataclasses.replace(SMALL, microbatches=3)
    options: dict[str, Any] = {"shape": shape, "placement": ONE, "store": tmp_path, "config": bodies.NUMPY}
    with m2n.ExpertComm(0, **options) as server, m2n.AttentionComm(0, **options) as comm, ThreadPoolExecutor() as pool:
        for _ in range(5):
            expected = [small_dispatch(comm, microbatch) for microbatch in range(3)]
            results = [pool.submit(comm.combine_recv, microbatch) for microbatch in range(3)]
            time.sleep(0.05)  # they sleep
            for microbatch in (2, 0, 1):
                batch = server.dispatch_recv(microbatch=microbatch)
                server.combine_send(batch, testing.expert_outputs(batch, range(4)))
                assert np.array_equal(results[microbatch].result(20), expected[microbatch])


@over_messages
def test_closing_ends_a_sleep_in_the_network(transport: str, tmp_path: Path) -> None:
    server = small_expert(tmp_path)
    with small_attention(tmp_path):
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                server.dispatch_recv(timeout=60)
            except m2n.SetupError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        server.close()
        thread.join(20)
        assert errors and "the comm is closed" in str(errors[0])


@over_messages
def test_both_sides_may_send_more_than_sockets_hold_at_once(transport: str, tmp_path: Path) -> None:
    shape = m2n.Shape(4096, 4, 1, 2048, 2, dispatch_dtype="float32", combine_dtype="float32")
    options: dict[str, Any] = {"shape": shape, "placement": ONE, "store": tmp_path, "config": bodies.NUMPY}
    x = np.full((2048, 4096), 3, np.float32)
    with m2n.ExpertComm(0, **options) as server, m2n.AttentionComm(0, **options) as comm, ThreadPoolExecutor() as pool:
        route = comm.route(np.zeros((2048, 1), np.int32), np.ones((2048, 1), np.float32))

        def answer(microbatch: int) -> None:
            batch = server.dispatch_recv(microbatch=microbatch)
            assert batch is not None
            y = batch.gather()
            server.combine_send(batch, y)
            y[:] = -1  # it is the caller's again

        comm.dispatch_send(x, route, 0)
        answered = pool.submit(answer, 0)
        comm.dispatch_send(x, route, 1)  # nobody takes it before its turn
        answered.result(20)
        assert (comm.combine_recv(0) == x).all()
        answer(1)
        assert (comm.combine_recv(1) == x).all()


@over_messages
def test_who_leaves_with_a_message_unread_takes_no_reply_back(transport: str, tmp_path: Path) -> None:
    """A socket that is closed before everything was read takes back what its peer has not."""
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm, 0)
        batch = server.dispatch_recv(microbatch=0)
        small_dispatch(comm, 1)
        server.combine_send(batch, testing.expert_outputs(batch, range(4)))
        server.close()
        assert np.array_equal(comm.combine_recv(0), expected)
        with pytest.raises(m2n.PeerLost, match="has left"):
            comm.combine_recv(1)
