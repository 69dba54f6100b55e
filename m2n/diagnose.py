# SPDX-License-Identifier: Apache-2.0
"""`python -m m2n diagnose`: by what two ranks can reach each other, how fast, and why not by the rest.

Alone it starts both ranks on this host. Between two hosts one side runs `diagnose --role expert --store URL` and the
other `diagnose --role attention --store URL`, with the settings (M2N_BIND, M2N_JOB_KEY, UCX_...) that a job would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ._C import Error
from .attention import AttentionComm
from .deadline import Deadline
from .expert import ExpertComm
from .features import features
from .interfaces import describe_addresses
from .ranks import serve
from .shape import Config, Placement, Shape
from .store import Store, look_up, open_store

TRANSPORTS = ("shm", "tcp", "ucx")
_ROW_BYTES = 1024
_LARGE_ROWS = 1024  # 1 MB
_ROUNDS, _LARGE_ROUNDS = 200, 20
_BEGIN_KEY, _END_KEY = "m2n/diagnose/begin", "m2n/diagnose/end"
_BEGIN_S = 30.0  # for the other side to be started
_JOIN_S = 10.0
_WHOLE_S = 60.0


def _shape() -> Shape:
    return Shape(_ROW_BYTES // 4, 1, 1, _LARGE_ROWS, dispatch_dtype="float32", combine_dtype="float32")


def _config(transport: str) -> Config:
    """As a job on this host would have it, but for the deadlines."""
    return dataclasses.replace(
        Config(), transport=transport, arrays="numpy", faults=None, timeout_s=_JOIN_S, connect_timeout_s=_JOIN_S
    )


def _open(store: Any) -> Store:
    return open_store(store, Deadline(_BEGIN_S), Config().store_timeout_s, "m2n diagnose")


def be_expert(store: Any) -> list[str]:
    """Answers on every transport until the other side has ended; what went wrong, in words."""
    problems: list[str] = []

    def answer(transport: str) -> None:
        try:
            options: dict[str, Any] = {"name": f"diagnose-{transport}", "config": _config(transport)}
            with ExpertComm(0, _shape(), Placement.block(1, 1), store, max_peers=2, **options) as comm:
                serve(comm, 1, lambda batch: batch.gather(), until=has_ended.is_set)
        except (Error, ValueError) as error:
            problems.append(f"{transport}: {error}")

    has_ended = threading.Event()
    threads = [threading.Thread(target=answer, args=(transport,), daemon=True) for transport in TRANSPORTS]
    for thread in threads:
        thread.start()
    opened = _open(store)
    opened.set(_BEGIN_KEY, "1")
    if look_up(opened, _END_KEY, Deadline(_WHOLE_S)) is None:
        problems.append(f"the attention side did not come to its end within {_WHOLE_S:.0f} s")
    has_ended.set()
    for thread in threads:
        thread.join(_JOIN_S)
    return problems


def measure(store: Any, transport: str) -> tuple[float, float]:
    """(one-way p50 in us of a row of 1 KB and its answer, bytes per second each way of messages of 1 MB)."""
    options: dict[str, Any] = {"name": f"diagnose-{transport}", "config": _config(transport)}
    with AttentionComm(0, _shape(), Placement.block(1, 1), store, max_peers=2, **options) as comm:
        times_s = {}
        for num_rows, rounds in ((1, _ROUNDS), (_LARGE_ROWS, _LARGE_ROUNDS)):
            x: Any = np.ones((num_rows, _ROW_BYTES // 4), np.float32)
            route = comm.route(np.zeros((num_rows, 1), np.int32), np.ones((num_rows, 1), np.float32))
            each = []
            for _ in range(rounds + rounds // 4):
                began = time.perf_counter()
                comm.dispatch_send(x, route)
                y = comm.combine_recv()
                each.append(time.perf_counter() - began)
            if not np.array_equal(x, y):
                raise Error(f"{transport}: rows came back that are not those that were sent")
            times_s[num_rows] = statistics.median(each[rounds // 4 :])
    return 1e6 * times_s[1] / 2, 2 * _LARGE_ROWS * _ROW_BYTES / times_s[_LARGE_ROWS]


def be_attention(store: Any) -> int:
    """Measures every transport, prints what it finds; how many work."""
    num_working, opened = 0, _open(store)
    if look_up(opened, _BEGIN_KEY, Deadline(_BEGIN_S)) is None:
        print(f"the expert side was not started within {_BEGIN_S:.0f} s, or has another store")
    for transport in TRANSPORTS:
        try:
            us, bytes_per_s = measure(store, transport)
        except (Error, ValueError) as error:
            print(f"{transport:4} no: {error}")
        else:
            num_working += 1
            print(f"{transport:4} yes: {us:.1f} us one way for 1 KB, {bytes_per_s / 1e9:.2f} GB/s each way at 1 MB")
    opened.set(_END_KEY, "1")
    print("what 'auto' takes: shm inside a host, tcp between hosts")
    for line in advice():
        print(f"- {line}")
    return num_working


def advice() -> list[str]:
    """What to change on this host, in sentences."""
    config, known = Config(), features()
    lines = []
    if not known["ucx"]:
        lines.append(f"no UCX, so no RDMA: {known['ucx_words']}")
    devices = Path("/sys/class/infiniband")
    has_rdma = devices.is_dir() and any(devices.iterdir())
    if has_rdma and "libucx" in known["ucx_words"]:
        lines.append("this host has RDMA devices, and UCX is the package's, without verbs: set M2N_UCX_LIBRARY to a "
                     "system's libucp.so.0")  # fmt: skip
    if not has_rdma:
        lines.append("no RDMA device (/sys/class/infiniband): take tcp between hosts")
    if not config.bind:
        lines.append(f"M2N_BIND is not set: expert ranks listen on this host only; it has {describe_addresses()}")
    if config.job_key is None and not config.insecure:
        lines.append("M2N_JOB_KEY is not set: ranks of other hosts are refused")
    if config.insecure:
        lines.append(config._insecure_words())
    return lines


def diagnose(role: str | None, store: Any) -> int:
    """The command; 0 where at least one transport works."""
    if role == "expert":
        problems = be_expert(store)
        for problem in problems:
            print(problem)
        return int(len(problems) >= len(TRANSPORTS))
    if role == "attention":
        return int(be_attention(store) == 0)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="m2n-"))
        other = multiprocessing.get_context("spawn").Process(target=be_expert, args=(folder,), daemon=True)
        # Ctrl-C reaches both processes: this one ends the other. A signal that is ignored stays so in a new program.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            other.start()
        finally:
            signal.signal(signal.SIGINT, before)
        num_working = be_attention(folder)
        other.join(_JOIN_S)
    return int(num_working == 0)
