# SPDX-License-Identifier: Apache-2.0
"""The transport `ucx`: finding UCX, what a bad peer can send, large messages, idling, threads, and what is refused.

That it gives the oracle's bits stands in `test_exchange.py`, what becomes of lost ranks in `test_faults.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from bodies import ONE, SMALL, small_answer, small_attention, small_dispatch, small_expert
from conftest import needs_compiler
from libraries import CXX, build_libraries
from test_processes import fork

import m2n
from m2n import _C, testing

ROOT = Path(__file__).parents[1]
overs = pytest.mark.parametrize(
    "transport", [pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "ucx-put")], indirect=True
)
over_tcp = pytest.mark.parametrize("transport", [pytest.param("ucx", marks=pytest.mark.ucx)], indirect=True)


# Finding UCX


def test_without_ucx_a_comm_says_what_to_install_and_everything_else_works(tmp_path: Path) -> None:
    code = """
import sys, m2n
features = m2n.features()
assert not features["ucx"] and "ucx" not in features["transports"], features
assert "pip install 'm2n[ucx]'" in features["ucx_words"] and "/nowhere/libucp.so.0" in features["ucx_words"]
shape, placement = m2n.Shape(8, 2, 1, 4), m2n.Placement.block(2, 1)
try:
    m2n.ExpertComm(0, shape, placement, sys.argv[1], config=m2n.Config(transport="ucx"))
except m2n.SetupError as error:
    assert "pip install 'm2n[ucx]'" in str(error) and "Config(ucx_library=" in str(error)
else:
    raise AssertionError("no error")
m2n.ExpertComm(0, shape, placement, sys.argv[1]).close()
assert "libucp" not in open("/proc/self/maps").read()
"""
    environment = {**os.environ, "M2N_UCX_LIBRARY": "/nowhere/libucp.so.0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=60)


def test_a_library_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "libucp.so.0").write_bytes(b"no library")
    with pytest.raises(m2n.SetupError, match="libucp.so.0: file too short|invalid ELF"):
        _C.describe_transport(f"ucx;library={tmp_path}/libucp.so.0")
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    with pytest.raises(m2n.SetupError, match="has no ucp_get_version"):
        _C.describe_transport(f"ucx;library={libc}")


@pytest.mark.ucx
def test_importing_and_other_transports_load_no_ucx(tmp_path: Path) -> None:
    code = """
import sys, m2n
shape, placement = m2n.Shape(8, 2, 1, 4), m2n.Placement.block(2, 1)
with m2n.ExpertComm(0, shape, placement, sys.argv[1]), m2n.AttentionComm(0, shape, placement, sys.argv[1]):
    assert "libucp" not in open("/proc/self/maps").read()
assert m2n.features()["ucx"] and "libucp" in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize("changes, words", [
    ({"ucx_way": "mail"}, "ucx_way: expected one of auto, message, put"),
    ({"ucx_library": "a;b"}, "ucx_library"),
    ({"ucx_variables": {"tls": "tcp"}}, "ucx_variables"),
    ({"ucx_variables": {"TLS": "tcp;way=put"}}, "ucx_variables"),
])  # fmt: skip
def test_bad_settings_name_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        m2n.Config(**changes)


@pytest.mark.parametrize("name", ["ucxx", "ucx;", "ucx;way=x", "ucx;nothing", "ucx;tls=tcp"])
def test_bad_native_names_are_refused(name: str) -> None:
    with pytest.raises(m2n.SetupError, match="expected 'ucx'"):
        _C.describe_transport(name)


@pytest.mark.ucx
def test_a_setting_that_ucx_refuses_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(bodies.config_of("ucx"), ucx_variables={"NO_SUCH_THING": "1"})
    with pytest.raises(m2n.SetupError, match="setting NO_SUCH_THING=1"):
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config)


@pytest.mark.ucx
@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("libucx") is None, reason="no headers of UCX (pip install libucx-cu12)")
def test_what_is_declared_of_ucx_is_what_its_headers_say(tmp_path: Path) -> None:
    (folder,) = importlib.util.find_spec("libucx").submodule_search_locations  # type: ignore[union-attr]
    command = [CXX, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{folder}/include"]
    done = subprocess.run([*command, str(ROOT / "tests/ucx_headers.cc")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[:2000]


# What a peer can send


@needs_compiler
def test_whatever_header_or_address_is_accepted_stays_within_its_objects(tmp_path: Path) -> None:
    program = tmp_path / "messages"
    options = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [ROOT / "tests/ucx_messages.cc", ROOT / "csrc/transport/ucx_message.cc"]
    subprocess.run([CXX, *options, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "1", "100000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.ucx
@needs_compiler
def test_a_bad_message_breaks_its_link_in_words_and_strangers_are_not_heard(tmp_path: Path) -> None:
    program = tmp_path / "garbage"
    command = [CXX, "-std=c++20", f"-I{ROOT / 'csrc'}", "-DM2N_HAS_CUDA=0", str(ROOT / "tests/ucx_garbage.cc")]
    library = build_libraries() / "libm2n_transport.a"
    subprocess.run([*command, str(library), "-o", str(program), "-ldl", "-lpthread"], check=True)
    ucx = re.sub(r"^UCX [\d.]+, ", "", m2n.features()["ucx_words"])
    environment = {**os.environ, "UCX_TLS": "tcp,self"}
    done = subprocess.run([str(program), ucx], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# Exchanges


@overs
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


@overs
def test_several_threads_of_one_comm_drive_and_serve(transport: str) -> None:
    import test_threads

    test_threads.drive_and_serve(bodies.NUMPY)


@over_tcp
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


@over_tcp
def test_ready_and_polls_make_progress_by_themselves(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm)
        deadline = time.monotonic() + 20
        while not small_answer(server, timeout=0):
            assert time.monotonic() < deadline
        while not comm.ready(0):
            assert time.monotonic() < deadline
        assert np.array_equal(comm.combine_recv(), expected)


@overs
def test_an_idle_pair_occupies_no_core(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        expected = small_dispatch(comm)
        assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)
        time.sleep(0.1)
        busy_s = time.process_time()
        time.sleep(1.0)  # nobody waits
        assert server.dispatch_recv(timeout=1.0) is None  # one waits
        assert time.process_time() - busy_s < 0.4


@over_tcp
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


@over_tcp
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


# What is refused


@pytest.mark.ucx
@pytest.mark.parametrize("transport, words", [("tcp,self", "tcp only emulates"), ("sysv,self", "sysv only emulates")])
def test_puts_are_refused_where_they_are_emulated(transport: str, words: str, tmp_path: Path) -> None:
    config = dataclasses.replace(bodies.config_of("ucx"), ucx_way="put", ucx_variables={"TLS": transport})
    options: dict[str, Any] = {"shape": SMALL, "placement": ONE, "store": tmp_path, "config": config}
    with m2n.ExpertComm(0, **options), pytest.raises(m2n.SetupError, match=words):
        m2n.AttentionComm(0, **options)


@over_tcp
def test_a_forked_child_is_told_to_be_spawned(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        assert "start processes with 'spawn'" in fork(lambda: small_expert(tmp_path, name="child"))()
        expected = small_dispatch(comm)
        assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    config = m2n.Config(transport="ucx", faults=m2n.Faults(delay_us=1))
    with pytest.raises(ValueError, match="over 'ucx' cannot be held back yet"):
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config)


@over_tcp
def test_both_sides_need_the_same_transport(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path), pytest.raises(m2n.SetupError, match="uses the transport"):
        m2n.AttentionComm(0, SMALL, ONE, tmp_path, config=bodies.config_of("shm"))
