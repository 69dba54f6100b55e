# SPDX-License-Identifier: Apache-2.0
"""Starts ranks as threads or processes of this one, for examples, notebooks and tests. Needs numpy only."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pickle
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from ._C import Error
from .attention import AttentionComm
from .comm import PeerStatus
from .expert import Batch, ExpertComm
from .shape import Config, Placement, Shape

RankFunction = Callable[[Any], Any]
_Results = dict[tuple[str, int], Any]
_POLL_S = 0.2


def serve(
    comm: ExpertComm,
    attention: int,
    apply: Callable[[Batch], Any],
    linger_us: float = 50,
    until: Callable[[], bool] = lambda: False,
) -> int:
    """An expert rank's loop: answers batches with apply(batch) until `attention` ranks have joined and none of them is
    there any more, whichever of their lives it was, or until() is true.

    Returns:
        The number of batches.

    Raises:
        PeerLost: one of them is lost.
    """
    num_batches = 0
    while True:
        batch = comm.dispatch_recv(linger_us=linger_us, timeout=_POLL_S)
        if batch is not None:
            comm.combine_send(batch, apply(batch))
            num_batches += 1
        elif until():
            return num_batches
        elif _are_over(comm.peers(), attention):
            comm.check()  # one may have been lost since the last look
            return num_batches


def _are_over(peers: list[PeerStatus], attention: int) -> bool:
    return len({peer.rank for peer in peers}) >= attention and all(peer.state != "live" for peer in peers)


@contextlib.contextmanager
def _own_stream(device: Any) -> Iterator[None]:
    """On a GPU each rank has a stream of its own, and has ended its work there when it ends."""
    if not str(device).startswith("cuda") or "torch" not in sys.modules:
        yield
        return
    import torch

    torch.cuda.synchronize(device)  # what the caller prepared
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.current_stream(device).synchronize()


def _run_rank(
    role: str,
    rank: int,
    fn: RankFunction,
    options: dict[str, Any],
    report: Callable[[BaseException], None],
    opened: list[Any] | None = None,
) -> Any:
    """Opens the rank's comm and calls fn; what fails is reported before its peers can notice, and None returned."""
    try:
        comm_type = AttentionComm if role == "attention" else ExpertComm
        device = options["device"][role]
        with _own_stream(device), comm_type(rank, **{**options, "device": device}) as comm:
            if opened is not None:
                opened.append(comm)
            try:
                return fn(comm)
            except BaseException as error:
                report(error)
    except BaseException as error:
        report(error)


def run_ranks(
    fn: RankFunction | tuple[RankFunction, RankFunction],
    attention: int = 2,
    experts: int = 2,
    *,
    shape: Shape,
    placement: Placement | None = None,
    processes: bool = False,
    timeout: float = 60.0,
    name: str = "default",
    max_peers: int = 64,
    device: Any = "cpu",
    config: Config | None = None,
) -> _Results:
    """Runs fn(comm) on M attention and N expert ranks and waits for all.

    Args:
        fn: called with each rank's AttentionComm or ExpertComm (`comm.role` tells), or a pair of functions,
            (for attention ranks, for expert ranks). With `processes` it must be importable (it is pickled).
        attention, experts: M and N.
        placement: default Placement.block(shape.num_experts, experts).
        processes: spawned processes instead of threads of this one.
        timeout: seconds for the whole run.
        device: of all ranks, or a pair (of attention ranks, of expert ranks). On a GPU each rank has a stream of its
            own, the current one in fn. Where only one of the two is a GPU, `config` needs transport="shm".

    Returns:
        fn's results by (role, rank).

    Raises:
        The first error of any rank; the others are ended. TimeoutError: the run took too long.
    """
    if attention < 1 or experts < 1:
        raise ValueError(f"attention, experts: expected at least 1 of each, got {attention} and {experts}")
    roles = ("attention", "expert")
    of_role = dict(zip(roles, fn if isinstance(fn, tuple) else (fn, fn)))
    ranks = [("expert", rank) for rank in range(experts)] + [("attention", rank) for rank in range(attention)]
    with tempfile.TemporaryDirectory(prefix="m2n-") as store:
        options = {
            "shape": shape,
            "placement": placement or Placement.block(shape.num_experts, experts),
            "store": store,
            "name": name,
            "max_peers": max_peers,
            "device": dict(zip(roles, device if isinstance(device, tuple) else (device, device))),
            # A job of its own: ranks of an earlier run that failed may still be ending.
            "config": dataclasses.replace(config or Config(), job=f"run_ranks-{secrets.token_hex(8)}"),
        }
        run = _run_processes if processes else _run_threads
        return run(ranks, of_role, options, time.monotonic() + timeout)


def _run_threads(
    ranks: list[tuple[str, int]], of_role: dict[str, RankFunction], options: dict[str, Any], deadline: float
) -> _Results:
    results: _Results = {}
    errors: list[BaseException] = []
    opened: list[Any] = []
    ended = threading.Semaphore(0)

    def run(role: str, rank: int) -> None:
        results[role, rank] = _run_rank(role, rank, of_role[role], options, errors.append, opened)
        ended.release()

    threads = [threading.Thread(target=run, args=rank, name=f"{rank[0]}-{rank[1]}", daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for _ in threads:
        if not ended.acquire(timeout=max(deadline - time.monotonic(), 0)):
            errors.append(TimeoutError(f"run_ranks: {sorted(set(ranks) - set(results))} did not end in time"))
        if errors:
            break
    if errors:
        first = errors[0]
        for comm in opened:  # what still waits ends with an error of its own
            comm.abort()
        raise first
    for thread in threads:
        thread.join()
    return results


def _process_main(connection: Connection, role: str, rank: int, fn: RankFunction, options: dict[str, Any]) -> None:
    def report(error: BaseException) -> None:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = Error(f"{type(error).__name__}: {error}")
        connection.send(("error", error))

    connection.send(("result", _run_rank(role, rank, fn, options, report)))


def _run_processes(
    ranks: list[tuple[str, int]], of_role: dict[str, RankFunction], options: dict[str, Any], deadline: float
) -> _Results:
    context = multiprocessing.get_context("spawn")
    results: _Results = {}
    running: dict[Connection, tuple[tuple[str, int], Any]] = {}
    try:
        for role, rank in ranks:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_process_main, args=(theirs, role, rank, of_role[role], options), daemon=True
            )
            process.start()
            theirs.close()
            running[ours] = ((role, rank), process)
        while running:
            ready = wait(list(running), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"run_ranks: {sorted(rank for rank, _ in running.values())} did not end in time")
            for connection in running.keys() & set(ready):
                (role, rank), process = running[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join(timeout=5)
                    raise Error(f"{role} rank {rank} died with exit code {process.exitcode}") from None
                if kind == "error":
                    raise cast(BaseException, value)
                results[role, rank] = value
                process.join()
                del running[connection]
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return results
