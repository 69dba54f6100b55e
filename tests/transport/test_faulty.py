# SPDX-License-Identifier: Apache-2.0
"""Runs on a transport with faults: late signals change when a result comes, not what it is, and lose nothing."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from bodies import ONE, SMALL, small_answer, small_dispatch
from oracle import REPLICAS, SHAPE, all_kinds, check
from processes import fork
from traffic import drain_and_leave
from waits import SOON_S, WAIT_S, until

import m2n
from m2n import _C, comm, testing

SPEC = "faulty:delay_ns=1000,jitter_ns=500,seed=7:shm"


def late(delay_s: float) -> dict[str, Any]:
    """Options of a comm whose signals are held back for so long."""
    return {"config": dataclasses.replace(bodies.NUMPY, faults=m2n.Faults(delay_us=1e6 * delay_s))}


def server_of(store: Path, delay_s: float = 0.0, **options: Any) -> m2n.ExpertComm:
    return m2n.ExpertComm(0, SMALL, ONE, store, **{**late(delay_s), **options})


def client_of(store: Path, delay_s: float = 0.0, **options: Any) -> m2n.AttentionComm:
    return m2n.AttentionComm(0, SMALL, ONE, store, **{**late(delay_s), **options})


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype, reduce_at", [("float32", "expert"), ("bfloat16", "attention")])
def test_results_equal_the_oracle_when_signals_are_late_and_overtake_each_other(dtype: str, reduce_at: str) -> None:
    shape = dataclasses.replace(SHAPE, microbatches=3, dispatch_dtype=dtype, combine_dtype=dtype, reduce_at=reduce_at)
    faults = m2n.Faults(delay_us=200, jitter_us=2000, seed=7)
    check(shape, REPLICAS, all_kinds(shape, 2), in_numpy=True, faults=faults)
    check(shape, m2n.Placement.block(8, 2), all_kinds(shape, 2), in_numpy=True, faults=faults)


def test_no_rank_leaves_too_early_where_messages_overtake_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = m2n.Faults(delay_us=100, jitter_us=3000, seed=1)
    monkeypatch.setattr(bodies, "NUMPY", dataclasses.replace(bodies.config_of("auto"), faults=faults))
    for leaver in (0, 1):
        drain_and_leave(tmp_path / str(leaver), leaver)


@pytest.mark.sanitize
def test_no_signal_is_early_and_what_was_held_is_counted(tmp_path: Path) -> None:
    delay_s, num_rounds = 0.02, 5
    with server_of(tmp_path, delay_s) as server, client_of(tmp_path, delay_s) as client:
        for _ in range(num_rounds):
            began = time.monotonic()
            expected = small_dispatch(client)
            assert not client.ready(0)
            batch = server.dispatch_recv()
            arrived = time.monotonic()
            assert arrived - began >= delay_s
            server.combine_send(batch, testing.expert_outputs(batch, range(4)))
            assert np.array_equal(client.combine_recv(), expected)
            assert time.monotonic() - arrived >= delay_s
        for stats in (client.stats(), server.stats()):
            assert stats["signals_held"] == num_rounds
            assert num_rounds * delay_s * 1e6 <= stats["held_us"] < num_rounds * SOON_S * 1e6


def test_one_side_alone_may_have_faults(tmp_path: Path) -> None:
    with server_of(tmp_path, config=bodies.NUMPY) as server, client_of(tmp_path, 0.01) as client:
        expected = small_dispatch(client)
        assert small_answer(server) and np.array_equal(client.combine_recv(), expected)
        assert (client.stats()["signals_held"], server.stats()["signals_held"]) == (1, 0)
        assert server.stats()["held_us"] == 0


def test_a_signal_that_is_held_occupies_no_core(tmp_path: Path) -> None:
    with server_of(tmp_path) as server, client_of(tmp_path, 1.0) as client:
        busy_s, began = time.process_time(), time.monotonic()
        small_dispatch(client)
        assert server.dispatch_recv() is not None
        assert time.monotonic() - began >= 1.0
        assert time.process_time() - busy_s < 0.3


@pytest.mark.sanitize
def test_closing_delivers_what_is_held_and_then_says_goodbye(tmp_path: Path) -> None:
    delay_s = 0.3
    closing = threading.Event()
    others_ran = threading.Event()

    def run_meanwhile() -> None:
        closing.wait()
        time.sleep(delay_s / 3)
        others_ran.set()

    thread = threading.Thread(target=run_meanwhile)
    thread.start()
    server = server_of(tmp_path, delay_s)
    with client_of(tmp_path) as client:
        expected = small_dispatch(client)
        assert small_answer(server)
        closing.set()
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < delay_s + SOON_S
        assert others_ran.is_set()  # it waits without Python's lock
        until(lambda: client.peers()[0].state == "left", "the goodbye", within_s=WAIT_S)
        assert np.array_equal(client.combine_recv(), expected)
    thread.join()


@pytest.mark.sanitize
def test_a_comm_that_ends_without_closing_drops_what_is_held(tmp_path: Path) -> None:
    """Nothing is written into memory that is gone."""
    gc.collect()  # what other tests have left must not go in between
    before = bodies.mapped_kib()
    delay_s = 0.2
    with server_of(tmp_path, name="dropped"):
        clients = [client_of(tmp_path, delay_s, name="dropped")]
        key = clients[0]._finalizer.detach()[2][2]
        small_dispatch(clients[0])
    until(
        lambda: clients[0].peers()[0].state == "left",
        "the end of the link, which keeps the comm alive",
        within_s=WAIT_S,
    )
    clients.clear()
    gc.collect()
    comm._open_ranks.discard(key)
    until(lambda: bodies.mapped_kib() == before, "the end of the comm", within_s=WAIT_S)
    time.sleep(delay_s)


def test_a_forked_child_neither_waits_for_what_is_held_nor_sends_it(tmp_path: Path) -> None:
    delay_s = 1.0
    held: list[Any] = [server_of(tmp_path), client_of(tmp_path, delay_s)]

    def end() -> str:
        began = time.monotonic()
        held[1].close()
        did_not_wait = time.monotonic() - began < delay_s / 2
        num_held = held[1].stats()["signals_held"]
        held.clear()
        gc.collect()  # in a child of the whole run it takes long by itself
        return f"{num_held} {did_not_wait}"

    expected = small_dispatch(held[1])
    assert fork(end)() == "returned '0 True'"
    server, client = held
    with server, client:
        assert small_answer(server) and np.array_equal(client.combine_recv(), expected)


def test_a_killed_process_takes_its_held_signals_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_FAULTS", "delay_us=9e6")
    process = multiprocessing.get_context("spawn").Process(
        target=bodies.expert_main, args=(0, str(tmp_path), SMALL, ONE, "answer_and_die")
    )
    process.start()  # it has read the environment when it makes its comm
    with client_of(tmp_path) as client:
        small_dispatch(client)
        began = time.monotonic()
        with pytest.raises(m2n.PeerLost, match="expert rank 0 is lost: its process died"):
            client.combine_recv()
        assert time.monotonic() - began < SOON_S
    process.join()


def test_the_same_seed_gives_the_same_delays() -> None:
    delays = _C.fault_delays(SPEC, 0, 1000)
    assert delays == _C.fault_delays(SPEC, 0, 1000)
    assert min(delays) >= 1000 and max(delays) <= 1500 and len(set(delays)) > 400
    others = [
        _C.fault_delays(SPEC, 1, 1000),  # another rank
        _C.fault_delays(SPEC, 1 << 32, 1000),  # the same rank of the other role
        _C.fault_delays(SPEC.replace("seed=7", "seed=8"), 0, 1000),
    ]
    for one, other in itertools.combinations([delays, *others], 2):
        assert sum(a == b for a, b in zip(one, other)) < 50
    assert set(_C.fault_delays("faulty:delay_ns=5,jitter_ns=0,seed=1:shm", 0, 9)) == {5}


@pytest.mark.parametrize(
    "spec",
    [
        "faulty",
        "faulty:shm",
        "faulty:delay_ns=1,jitter_ns=1:shm",
        "faulty:jitter_ns=1,delay_ns=1,seed=1:shm",
        "faulty:delay_ns=-1,jitter_ns=1,seed=1:shm",
        "faulty:delay_ns=1,jitter_ns=1,seed=18446744073709551616:shm",
        "faulty:delay_ns=1.5,jitter_ns=1,seed=1:shm",
        "faulty:delay_ns=9000000000,jitter_ns=1000000001,seed=1:shm",
        "faulty:delay_ns=1,jitter_ns=1,seed=1",
        "faulty:delay_ns=1,jitter_ns=1,seed=1:",
        f"faulty:delay_ns=1,jitter_ns=1,seed=1:{SPEC}",
    ],
)
def test_a_bad_native_name_is_refused(spec: str) -> None:
    with pytest.raises(m2n.SetupError, match="transport: expected 'faulty:delay_ns=<int>,jitter_ns=<int>,seed=<int>:"):
        _C.AttentionComm(SMALL._native(), 0, 1, spec)


def test_an_unknown_transport_within_is_refused() -> None:
    with pytest.raises(m2n.SetupError, match="transport: 'smoke' is not known to this build; known: shm, auto, faulty"):
        _C.AttentionComm(SMALL._native(), 0, 1, SPEC.replace("shm", "smoke"))


def test_faults_come_from_the_environment_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_FAULTS", "delay_us=500,jitter_us=1e2,seed=1")
    assert m2n.Config().faults == m2n.Faults(delay_us=500, jitter_us=100, seed=1)
    assert m2n.Config(faults=None).faults is None
    monkeypatch.setenv("M2N_FAULTS", "")
    assert m2n.Config().faults is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("500", "got '500' in '500'"),
        ("delay=500", "got 'delay' in"),
        ("delay_us=500,", "got '' in"),
        ("delay_us=1,delay_us=2", "got 'delay_us' in"),
        ("delay_us=soon", "got 'delay_us=soon' in"),
        ("delay_us=1,seed=0.5", "got 'seed=0.5' in"),
        ("delay_us=-1", "delay_us: expected microseconds from 0 to 10000000, got -1.0"),
        ("seed=-1", "seed: expected at least 0"),
    ],
)
def test_a_bad_variable_is_refused_by_name(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_FAULTS", text)
    with pytest.raises(ValueError, match=f"^M2N_FAULTS: expected something like 'delay_us=500.*{words}"):
        m2n.Config()


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"delay_us": float("nan")}, ValueError, "delay_us: expected microseconds from 0 to 10000000, got nan"),
        ({"delay_us": float("inf")}, ValueError, "delay_us: expected microseconds"),
        ({"jitter_us": -1}, ValueError, "jitter_us: expected microseconds"),
        ({"jitter_us": "1"}, TypeError, "jitter_us: expected microseconds, got '1'"),
        (
            {"delay_us": 6e6, "jitter_us": 5e6},
            ValueError,
            r"jitter_us: expected delay_us \+ jitter_us of at most 10000000",
        ),
        ({"seed": 0.5}, TypeError, "seed: expected an int"),
        ({"seed": 2**64}, ValueError, f"seed: expected at most {2**64 - 1}"),
    ],
)
def test_bad_faults_are_refused_by_name(fields: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        m2n.Faults(**fields)


@pytest.mark.parametrize("device", ["emulated", "cuda:0"])
def test_comms_whose_verbs_are_launched_refuse_faults(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"config.faults: signals of kernels cannot be held back yet.*{device}"):
        server_of(tmp_path, 0.1, device=device)
    with pytest.raises(TypeError, match=r"faults: expected m2n\.Faults or None, got dict"):
        m2n.Config(faults={"delay_us": 1})  # type: ignore[arg-type]
