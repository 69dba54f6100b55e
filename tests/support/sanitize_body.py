# SPDX-License-Identifier: Apache-2.0
"""What runs under a sanitizer: thread ranks that exchange, come and go, and close under a waiter. Needs numpy only.

Usage: python sanitize_body.py SECONDS [SEED]. Every result is compared, so a run without a report has also worked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import m2n
from m2n.ranks import run_ranks, serve
from m2n.testing import apply_expert, dequantize_rows, expert_outputs, quantize_rows

CONFIG = m2n.Config(arrays="numpy", timeout_s=60.0, connect_timeout_s=60.0)


class Work(NamedTuple):
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def make_shape(reduce_at: Any = "expert", hidden: int = 40, dispatch_dtype: str = "float32") -> m2n.Shape:
    return m2n.Shape(
        hidden=hidden, num_experts=7, top_k=3, max_tokens=12, microbatches=3,
        dispatch_dtype=dispatch_dtype, combine_dtype="float32", reduce_at=reduce_at,
    )  # fmt: skip


def make_work(shape: m2n.Shape, random: np.random.Generator) -> Work:
    """A random dispatch, sometimes empty, with padded ids."""
    num_tokens = int(random.integers(0, shape.max_tokens + 1))
    order = np.argsort(random.random((num_tokens, shape.num_experts)), axis=1)
    ids = order[:, : shape.top_k].astype(np.int32)
    ids[random.random(ids.shape) < 0.15] = -1
    weights = random.random(ids.shape, np.float32)
    x = random.standard_normal((num_tokens, shape.hidden), np.float32)
    return Work(x, ids, weights)


def expected(shape: m2n.Shape, placement: m2n.Placement, work: Work) -> np.ndarray:
    """What combine_recv must return, bit for bit, for a placement without replicas."""
    if shape.dispatch_dtype != "float32":
        work = work._replace(x=dequantize_rows(*quantize_rows(work.x), "float32"))
    total = np.zeros((len(work.x), shape.hidden), np.float32)
    if shape.reduce_at == "attention":
        for k in range(shape.top_k):
            for expert in range(shape.num_experts):
                chosen = work.ids[:, k] == expert
                total[chosen] += work.weights[chosen, k, None] * apply_expert(expert, work.x[chosen])
        return total
    for home in range(placement.num_expert_ranks):
        partial = np.zeros_like(total)
        for expert in placement.experts_of(home):
            for k in range(shape.top_k):
                chosen = work.ids[:, k] == expert
                partial[chosen] += work.weights[chosen, k, None] * apply_expert(expert, work.x[chosen])
        total += partial
    return total


def drive(comm: m2n.AttentionComm, random: np.random.Generator, num_layers: int) -> None:
    """Layers through all microbatches, as many in flight as there are; each result is checked."""
    num_microbatches = comm.shape.microbatches
    flying: dict[int, Work] = {}
    for layer in range(num_layers + num_microbatches):
        microbatch = layer % num_microbatches
        if microbatch in flying:
            work = flying.pop(microbatch)
            if random.random() < 0.3:
                assert comm.wait_ready([microbatch]) == microbatch
            y = comm.combine_recv(microbatch)
            assert np.array_equal(y, expected(comm.shape, comm.placement, work)), "a wrong result"
        if layer < num_layers:
            flying[microbatch] = work = make_work(comm.shape, random)
            comm.dispatch_send(work.x, comm.route(work.ids, work.weights), microbatch, layer)
    if random.random() < 0.5:
        comm.idle()


@contextlib.contextmanager
def observed(comm: Any) -> Iterator[None]:
    """Another thread looks at what a comm shows of itself, all the while."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            comm.stats(), comm.peers(), comm.check()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def answer(comm: m2n.ExpertComm, num_attention: int) -> int:
    experts = comm.placement.experts_of(comm.rank)
    return serve(comm, num_attention, lambda batch: expert_outputs(batch, experts))


def exchange(seed: int, reduce_at: str, hidden: int, dispatch_dtype: str, device: str) -> None:
    """Three attention ranks and three expert ranks, everything in flight, all watched.

    On "emulated" each verb is run by a team of threads, as a GPU runs it, and streams wait by themselves. "tcp": on
    CPUs, over sockets.
    """

    def attention(comm: m2n.AttentionComm) -> None:
        with observed(comm):
            drive(comm, np.random.default_rng((seed, comm.rank)), 12)

    def expert(comm: m2n.ExpertComm) -> None:
        with observed(comm):
            answer(comm, 3)

    shape = make_shape(reduce_at, hidden, dispatch_dtype)
    config = CONFIG if device == "cpu" else dataclasses.replace(CONFIG, transport="shm", stream_waits=True)
    if device == "tcp":
        config, device = dataclasses.replace(CONFIG, transport="tcp"), "cpu"
    run_ranks((attention, expert), 3, 3, shape=shape, config=config, max_peers=8, device=device)


def come_and_go(seed: int) -> None:
    """Attention ranks join, work and leave, again and again, while the expert ranks serve the others."""
    shape, num_ranks, num_lives = make_shape(), 2, 3
    placement = m2n.Placement.block(shape.num_experts, 2)
    errors: list[BaseException] = []
    everybody_left = threading.Event()

    def guarded(body: Callable[..., None], *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                body(*arguments)
            except BaseException as error:
                errors.append(error)
                everybody_left.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def expert(rank: int, store: str) -> None:
        experts = placement.experts_of(rank)
        with m2n.ExpertComm(rank, shape, placement, store, max_peers=num_ranks * num_lives, config=CONFIG) as comm:
            while not everybody_left.is_set():
                batch = comm.dispatch_recv(timeout=0.05)
                if batch is not None:
                    comm.combine_send(batch, expert_outputs(batch, experts))

    def attention(rank: int, store: str) -> None:
        for life in range(num_lives):
            with m2n.AttentionComm(rank, shape, placement, store, config=CONFIG) as comm:
                drive(comm, np.random.default_rng((seed, rank, life)), 4)

    with tempfile.TemporaryDirectory() as store:
        experts = [guarded(expert, rank, store) for rank in range(2)]
        for thread in [guarded(attention, rank, store) for rank in range(num_ranks)]:
            thread.join()
        everybody_left.set()
        for thread in experts:
            thread.join()
    if errors:
        raise errors[0]


def close_under_a_waiter() -> None:
    """A comm is closed while another thread of the process waits in one of its calls."""
    shape = make_shape()
    placement = m2n.Placement.block(shape.num_experts, 1)
    work = make_work(shape, np.random.default_rng(1))
    ended: list[BaseException] = []

    def wait_in(call: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                call()
            except m2n.Error as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with tempfile.TemporaryDirectory() as store:
        expert = m2n.ExpertComm(0, shape, placement, store, config=CONFIG)
        attention = m2n.AttentionComm(0, shape, placement, store, config=CONFIG)
        attention.dispatch_send(work.x, attention.route(work.ids, work.weights), microbatch=0, layer=1)
        waiters = [wait_in(lambda: attention.combine_recv(0)), wait_in(lambda: expert.dispatch_recv(layer=2))]
        time.sleep(0.05)
        attention.close()
        expert.close()
        for thread in waiters:
            thread.join()
    assert len(ended) == 2, ended


def main(seconds: float, seed: int) -> None:
    ends = time.monotonic() + seconds
    num_rounds = 0
    while num_rounds == 0 or time.monotonic() < ends:
        for device, is_float8 in (("cpu", seed % 2 == 1), ("tcp", seed % 2 == 1), ("emulated", seed % 2 == 0)):
            dispatch_dtype = "float8_e4m3fn" if is_float8 else "float32"
            exchange(seed, ("expert", "attention")[seed % 4 // 2], 40 if seed % 3 else 4096, dispatch_dtype, device)
        come_and_go(seed)
        close_under_a_waiter()
        seed += 1
        num_rounds += 1
    print(f"sanitizer {m2n.features()['sanitizer']}: {num_rounds} rounds, numpy only: {'torch' not in sys.modules}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
