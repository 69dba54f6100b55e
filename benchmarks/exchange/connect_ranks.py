# SPDX-License-Identifier: Apache-2.0
"""What the processes of `m2n-bench connect` do: listen, join again and again, or exchange while others join."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import m2n

from ..harness.runs import RunFailed

QUIET, JOINING, BUSY = range(3)  # what a phase is: its number modulo NUM_KINDS
NUM_KINDS = 3
LEAVING, ENDED = -1, -2  # phases: attention ranks leave; then expert ranks end
_POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all ranks of a run agree on. `folder`: the store, and the word that says which phase it is."""

    folder: str
    shape: m2n.Shape
    num_expert: int
    max_peers: int  # attention ranks that ever join

    def attention(self, rank: int) -> m2n.AttentionComm:
        """Joins all expert ranks."""
        return m2n.AttentionComm(rank, **self._options(), max_peers=self.num_expert)

    def expert(self, rank: int) -> m2n.ExpertComm:
        """Listens."""
        return m2n.ExpertComm(rank, **self._options(), max_peers=self.max_peers)

    def _options(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "store": f"{self.folder}/store",
            "placement": m2n.Placement.block(self.shape.num_experts, self.num_expert),
            "config": m2n.Config(arrays="numpy", faults=None),
        }  # fmt: skip

    def phase(self) -> np.ndarray:
        """int64 [1], which all processes see."""
        path = Path(self.folder) / "phase"
        if not path.exists():
            np.zeros(1, np.int64).tofile(path)
        return np.memmap(path, np.int64, "r+", shape=(1,))


def listen(connection: Connection, setup: Setup, rank: int) -> None:
    """An expert rank that is there, until it is told to end."""
    with setup.expert(rank):
        connection.send((True, None))
        connection.recv()


def join(connection: Connection, setup: Setup, ranks: Sequence[int], pause_s: float) -> list[float]:
    """Joins, leaves and pauses, once as each of these attention ranks; the seconds of each join."""
    times = []
    for rank in ranks:
        began = time.monotonic()
        comm = setup.attention(rank)
        times.append(time.monotonic() - began)
        comm.close()
        time.sleep(pause_s)
    return times


def join_by_phase(connection: Connection, setup: Setup, rank: int, max_joins: int, pause_s: float) -> list[float]:
    """The same, as one attention rank, in phases of JOINING and at most so often in each.

    In phases of BUSY it computes instead, for as long as its fastest join has taken.
    """
    phase, times = setup.phase(), []
    connection.send((True, None))
    last, turns = 0, 0
    while (now := int(phase[0])) >= 0:
        last, turns = now, turns if now == last else 0
        kind = now % NUM_KINDS
        if kind == QUIET or turns == max_joins:
            time.sleep(0.001)
            continue
        if kind == JOINING:
            times += join(connection, setup, [rank], pause_s)
        else:
            until = time.process_time() + min(times, default=0.0)
            while time.process_time() < until:
                pass
            time.sleep(pause_s)
        turns += 1
    return times


def exchange(connection: Connection, setup: Setup, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """An attention rank that dispatches and combines without a pause: (phase, us) of its round trips."""
    shape, phase = setup.shape, setup.phase()
    x = np.zeros((shape.max_tokens, shape.hidden), shape.dispatch_dtype)
    y = np.empty_like(x)
    ids = (np.arange(shape.max_tokens)[:, None] + np.arange(shape.top_k) * (shape.num_experts // shape.top_k)) % (
        shape.num_experts
    )
    phases, times_us = [], []
    with setup.attention(rank) as comm:
        route = comm.route(ids, np.full(ids.shape, 0.5, np.float32))
        connection.send((True, None))
        while (now := int(phase[0])) >= 0:
            began_ns = time.monotonic_ns()
            comm.dispatch_send(x, route)
            comm.combine_recv(out=y)
            times_us.append((time.monotonic_ns() - began_ns) / 1e3)
            phases.append(now)
    return np.array(phases), np.array(times_us)


def serve(connection: Connection, setup: Setup, rank: int) -> None:
    """An expert rank that answers without computing, until all attention ranks have left."""
    shape, phase = setup.shape, setup.phase()
    with setup.expert(rank) as comm:
        connection.send((True, None))
        y = np.zeros((shape.max_tokens * setup.max_peers, shape.hidden), shape.combine_dtype)
        while int(phase[0]) != ENDED:
            batch = comm.dispatch_recv(timeout=_POLL_S)
            if batch is not None:
                comm.combine_send(batch, y[: batch.num_rows], reduced=True)


def _main(connection: Connection, fn: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        connection.send((True, fn(connection, *arguments)))
    except Exception:
        connection.send((False, traceback.format_exc()))


class Processes:
    """Processes that each run one function; those that are still there at the end are killed."""

    def __init__(self) -> None:
        self._started: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process, connection in self._started:
            connection.close()
            process.kill()
            process.join()

    def start(self, fn: Callable[..., Any], *arguments: Any) -> Connection:
        """Runs fn(connection, *arguments) in a process of its own."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(theirs, fn, arguments), daemon=True)
        process.start()
        theirs.close()
        self._started.append((process, ours))
        return ours


def receive(connection: Connection, timeout_s: float) -> Any:
    """The next thing that a process says, or returns.

    Raises:
        RunFailed: it raised, died, or said nothing for so long.
    """
    try:
        if not connection.poll(timeout_s):
            raise RunFailed(f"a rank said nothing for {timeout_s:.0f} s")
        is_fine, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise RunFailed("a rank died") from None
    if not is_fine:
        raise RunFailed(value)
    return value
