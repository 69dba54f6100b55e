# SPDX-License-Identifier: Apache-2.0
"""Programs that end while daemon threads are at work; each returns, and then the interpreter ends."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import m2n
from m2n import testing

LARGE = m2n.Shape(7168, 4, 2, 256, dispatch_dtype="float32", combine_dtype="float32")
SMALL = m2n.Shape(8, 4, 2, 16, dispatch_dtype="float32", combine_dtype="float32")
ONE = m2n.Placement.block(4, 1)
LONG_S = 1000.0


def start(*calls: Callable[[], Any]) -> None:
    for call in calls:
        threading.Thread(target=call, daemon=True).start()


def end_soon() -> None:
    threading.excepthook = lambda _: None  # that their comms are closed is no news
    time.sleep(0.25)


def pair(shape: m2n.Shape, device: str = "cpu") -> tuple[m2n.ExpertComm, m2n.AttentionComm, m2n.Route]:
    store = tempfile.mkdtemp()
    expert = m2n.ExpertComm(0, shape, ONE, store, device=device)
    comm = m2n.AttentionComm(0, shape, ONE, store, device=device)
    tokens = shape.max_tokens
    return expert, comm, comm.route(np.tile([[0, 1]], (tokens, 1)), np.full((tokens, 2), 0.5))


def loop(expert: m2n.ExpertComm, comm: m2n.AttentionComm, route: Any, x: Any) -> None:
    def dispatch() -> None:
        while True:
            comm.dispatch_send(x, route)
            comm.combine_recv()

    def answer() -> None:
        while True:
            batch = expert.dispatch_recv()
            expert.combine_send(batch, batch.gather())

    start(dispatch, answer)
    end_soon()


def in_traffic() -> None:
    loop(*pair(LARGE), np.ones((LARGE.max_tokens, LARGE.hidden), np.float32))


def in_long_waits(device: str = "cpu") -> None:
    expert, comm, route = pair(SMALL, device)

    def dispatch() -> None:
        comm.dispatch_send(np.ones((SMALL.max_tokens, SMALL.hidden), np.float32), route)
        comm.combine_recv(timeout=LONG_S)

    start(
        dispatch,
        lambda: expert.dispatch_recv(layer=9, microbatch=0, timeout=LONG_S),
        lambda: expert.wait_peer(5, LONG_S),
    )
    end_soon()


def in_long_waits_on_a_device() -> None:
    in_long_waits("emulated")


def in_run_ranks() -> None:
    def attention(comm: m2n.AttentionComm) -> None:
        route = comm.route(np.tile([[0, 1]], (16, 1)), np.full((16, 2), 0.5))
        while True:
            comm.dispatch_send(np.ones((16, 8), np.float32), route)
            comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        testing.serve(comm, 5, lambda batch: batch.gather())

    start(lambda: testing.run_ranks((attention, expert), shape=SMALL))
    end_soon()


def in_connects() -> None:
    store = tempfile.mkdtemp()
    start(*[lambda rank=rank: m2n.AttentionComm(rank, LARGE, ONE, store) for rank in range(3)])  # type: ignore[misc]
    end_soon()


class Slow:
    """A tensor whose __dlpack__ is Python code, in which threads change."""

    def __init__(self) -> None:
        self.rows = np.ones((SMALL.max_tokens, SMALL.hidden), np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        for _ in range(300):
            sum(range(100))
        return self.rows.__dlpack__(**options)


def in_python_code_that_a_verb_calls() -> None:
    loop(*pair(SMALL), Slow())


class Last:
    """Dies when the interpreter takes its modules apart, and calls then what gives up the lock and wants it back."""

    def __init__(self, comm: m2n.AttentionComm) -> None:
        self.comm = comm

    def __del__(self) -> None:
        self.comm.abort()


def in_long_waits_and_the_main_thread_in_a_call() -> None:
    expert, comm, _ = pair(SMALL)
    globals()["last"] = Last(comm)
    start(lambda: expert.wait_peer(5, LONG_S))
    end_soon()
