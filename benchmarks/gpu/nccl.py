# SPDX-License-Identifier: Apache-2.0
"""m2n between processes beside NCCL, on one GPU or several: its grouped send and recv, or its one-sided puts
(`--peer nccl-put`: ncclPutSignal). Part of `make gpu`; prints lines of JSON.

One attention rank and N expert ranks, a process each; with several GPUs the attention rank has the first, the experts
the second. A round trip brings T rows to their expert ranks, T / N each, and as many back. The two take turns in one
run, some round trips at a time: what one launches ahead must not wait beside the other. The host's clock times them,
the end on the device included; expert ranks launch theirs ahead. Peers are favoured: they know all counts, and rows to
be put lie in a registered window already.

`--stream-waits`: m2n's windows lie in memory of the host and streams wait for its signals, not kernels, which hold a
GPU that processes have in turns until the turn ends. Several ranks on one GPU need NCCL 2.30 or later and
NCCL_MULTI_RANK_GPU_ENABLE=1. With `--peer gloo --device cpu`, or with a library in NCCL's place (`--nccl`), the same
runs where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import m2n
from m2n.benchmarks.contenders.nccl_put import SHARED_SINCE, Library, NcclError, Window, find_library
from m2n.testing import run_ranks

WARM_UP = 5  # round trips of each turn that are not counted
TIMEOUT_S = 30.0
WHOLE_RUN_S = 50.0  # then all ranks are ended: one that hangs would keep the GPU from what comes next


def device_of(kind: str, process: int) -> str:
    """Of a process of the group, the attention rank first."""
    return f"cuda:{min(process, torch.cuda.device_count() - 1, 1)}" if kind == "cuda" else kind


def bounds_of(tokens: int, expert_ranks: int) -> list[int]:
    """The first row of each expert rank, and the number of all."""
    return [-(-tokens * rank // expert_ranks) for rank in range(expert_ranks + 1)]


def shared_store(options: argparse.Namespace, folder: str, name: str) -> dist.FileStore:
    """A store of all processes."""
    shared = dist.FileStore(f"{folder}/{name}", 1 + options.expert_ranks)
    shared.set_timeout(datetime.timedelta(seconds=TIMEOUT_S))
    return shared


class GroupPeer:
    """Grouped sends and receives of torch.distributed, over NCCL or gloo."""

    def __init__(self, options: argparse.Namespace, store: str, process: int, device: str) -> None:
        dist.init_process_group(
            options.peer, init_method=f"file://{store}/group", rank=process, world_size=1 + options.expert_ranks,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
        self.options, self.process, self.device = options, process, device
        self.processes = range(1, 1 + options.expert_ranks)

    def begin(self, tokens: int) -> None:
        """Before round trips of so many rows."""
        bounds = bounds_of(tokens, self.options.expert_ranks)
        self.counts = [end - first for first, end in zip(bounds, bounds[1:])]
        num_rows = tokens if self.process == 0 else self.counts[self.process - 1]
        self.x = torch.empty(num_rows, self.options.hidden, dtype=torch.bfloat16, device=self.device)
        self.replies = torch.empty_like(self.x)

    def round_trip(self) -> None:
        exchange(list(zip(self.x.split(self.counts), self.processes)), [])
        exchange([], list(zip(self.replies.split(self.counts), self.processes)))

    def answer(self) -> None:
        exchange([], [(self.x, 0)])
        exchange([(self.x, 0)], [])

    def close(self) -> None:
        dist.destroy_process_group()


def exchange(sends: list[tuple[torch.Tensor, int]], receives: list[tuple[torch.Tensor, int]]) -> None:
    """One group of sends and receives with other processes; returns when they are done, or on a GPU enqueued."""
    operations = [dist.P2POp(dist.isend, tensor, process) for tensor, process in sends]
    operations += [dist.P2POp(dist.irecv, tensor, process) for tensor, process in receives]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


class PutPeer:
    """ncclPutSignal. Each rank's window holds rows to be sent, and behind them those that have come."""

    def __init__(self, options: argparse.Namespace, store: str, process: int, device: str) -> None:
        shared = shared_store(options, store, "group")
        self.options, self.process, most = options, process, max(options.tokens)
        self.row_bytes = 2 * options.hidden
        self.half = most * self.row_bytes
        sizes = (1 + options.expert_ranks, 2 * self.half)
        self.window = Window(Library(options.nccl), shared, process, *sizes, device)
        self.halves = self.window.memory.view(torch.bfloat16).view(2, most, options.hidden)

    def begin(self, tokens: int) -> None:
        """Before round trips of so many rows."""
        bounds = bounds_of(tokens, self.options.expert_ranks)
        self.places = [(self.row_bytes * at, self.row_bytes * (end - at)) for at, end in zip(bounds, bounds[1:])]
        self.x, self.replies = self.halves[:, :tokens]

    def round_trip(self) -> None:
        self.window.put([(1 + k, size, first, self.half) for k, (first, size) in enumerate(self.places)])
        self.window.wait(range(1, 1 + len(self.places)))

    def answer(self) -> None:
        first, size = self.places[self.process - 1]
        self.window.wait([0])
        self.window.put([(0, size, self.half, self.half + first)])

    def close(self) -> None:
        self.window.close()


def join(options: argparse.Namespace, store: str, process: int, device: str) -> GroupPeer | PutPeer:
    """The peer's end of a process; both communicate on the current stream."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    return (PutPeer if options.peer == "nccl-put" else GroupPeer)(options, store, process, device)


class Turns:
    """Who has the devices: expert ranks begin a turn when the attention rank does, with all before at its end."""

    def __init__(self, options: argparse.Namespace, store: str) -> None:
        self._store = shared_store(options, store, "turns")
        self.num_turns = min(4, options.rounds)  # of each, for each number of tokens
        self.num_trips = WARM_UP + options.rounds // self.num_turns

    def begin(self, *which: object) -> None:
        self._store.set(str(which), "")

    def await_begin(self, *which: object) -> None:
        self._store.wait([str(which)])


def host_us(work: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began)


def attention(comm: m2n.AttentionComm, options: argparse.Namespace, store: str) -> dict[int, dict[str, list[float]]]:
    """The one attention rank; times by the number of tokens."""
    peer, turns = join(options, store, 0, comm.device), Turns(options, store)
    samples = {tokens: time_trips(comm, peer, turns, options, tokens) for tokens in options.tokens}
    comm.check()
    peer.close()
    return samples


def time_trips(
    comm: m2n.AttentionComm, peer: GroupPeer | PutPeer, turns: Turns, options: argparse.Namespace, tokens: int
) -> dict[str, list[float]]:
    """Round trips, those of m2n and of the peer in turn."""
    device = comm.device
    peer.begin(tokens)
    x = torch.randn(tokens, options.hidden, device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    peer.x.copy_(x)
    ids = (torch.arange(tokens, device=device) * options.expert_ranks // tokens)[:, None]
    route = comm.route(ids, torch.ones(tokens, 1, device=device))

    def by_m2n() -> None:
        comm.dispatch_send(x, route)
        comm.combine_recv(out=y)

    samples: dict[str, list[float]] = {"m2n": [], options.peer: []}
    for turn in range(turns.num_turns):
        for name, work in (("m2n", by_m2n), (options.peer, peer.round_trip)):
            turns.begin(tokens, turn, name)
            samples[name] += [host_us(work, device) for _ in range(turns.num_trips)][WARM_UP:]
    if not torch.equal(y, x) or not torch.equal(peer.replies, x):
        raise RuntimeError("the rows that came back are not those that were sent")
    return samples


def expert(comm: m2n.ExpertComm, options: argparse.Namespace, store: str) -> None:
    """Sends what it gets back as it is."""
    peer, turns = join(options, store, 1 + comm.rank, comm.device), Turns(options, store)
    capacity = options.expert_ranks * max(options.tokens)  # of max_peers attention ranks
    y = torch.empty(capacity, options.hidden, dtype=torch.bfloat16, device=comm.device)
    for tokens in options.tokens:
        peer.begin(tokens)
        first, end = bounds_of(tokens, options.expert_ranks)[comm.rank :][:2]

        def by_m2n(count: int = end - first) -> None:
            batch = comm.dispatch_recv(0, 0, linger_us=None, attention_ranks=[0], sync=False)
            if batch is None:
                raise RuntimeError("no rows have come in time")
            torch.index_select(batch.x, 0, batch.row_index_by_expert[:count], out=y[:count])
            comm.combine_send(batch, y[: batch.num_pairs])

        for turn in range(turns.num_turns):
            for name, answer in (("m2n", by_m2n), (options.peer, peer.answer)):
                turns.await_begin(tokens, turn, name)
                for _ in range(turns.num_trips):
                    answer()
        if comm.device != "cpu":
            torch.cuda.synchronize()
        comm.check()
    peer.close()


def rows_of(samples: dict[str, list[float]], options: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """Lines of the result: the peer's first, which is the limit of m2n's."""
    rows, limit_us = [], None
    num_bytes = 2 * 2 * options.hidden * tokens
    for key in (options.peer, "m2n"):
        each, name = sorted(samples[key]), "m2n, streams wait" if key == "m2n" and options.stream_waits else key
        p50, p99 = each[len(each) // 2], each[min(len(each) - 1, round(0.99 * len(each)))]
        row = {
            "name": f"round trip between 1 + {options.expert_ranks} processes, {name}, {tokens} x "
            f"{options.hidden} bf16",
            "bytes": num_bytes, "samples": len(each), "p50_us": round(p50, 3), "p99_us": round(p99, 3),
        }  # fmt: skip
        if limit_us is not None:
            row |= {"limit_us": round(limit_us, 3), "ratio": round(p50 / limit_us, 3), "limit": options.peer}
        rows, limit_us = [*rows, row], p50
    return rows


def require_nccl(options: argparse.Namespace) -> str:
    """Which NCCL puts, in words; ends the program where none can."""
    library = Library(options.nccl)
    words = f"NCCL {library.version_words} ({library.path})"
    if options.device == "cuda" and torch.cuda.device_count() < 2 and library.version < SHARED_SINCE:
        raise NcclError(f"{words}: two ranks on one GPU are not supported before 2.30")
    return words


def main() -> int:
    """The command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="nccl", choices=("nccl", "nccl-put", "gloo"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--nccl", default=find_library(), help="libnccl.so.2 of nccl-put (default %(default)s)")
    parser.add_argument("--stream-waits", action="store_true", help="with --device cuda: m2n's streams wait")
    parser.add_argument("--expert-ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 4096])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    if options.peer == "nccl-put":
        try:
            print(require_nccl(options), flush=True)
        except NcclError as error:
            sys.exit(f"gpu_nccl: {error}")
    shape = m2n.Shape(options.hidden, options.expert_ranks, 1, max(options.tokens))
    devices = (device_of(options.device, 0), device_of(options.device, 1))
    place = {"transport": "shm", "stream_waits": True} if options.stream_waits else {}
    config = m2n.Config(arrays="torch", timeout_s=TIMEOUT_S, **place)
    with tempfile.TemporaryDirectory(prefix="m2n-") as store:
        bodies = tuple(functools.partial(body, options=options, store=store) for body in (attention, expert))
        samples = run_ranks(
            bodies, 1, options.expert_ranks, shape=shape, processes=True, device=devices, config=config,
            max_peers=options.expert_ranks, timeout=max(WHOLE_RUN_S + began - time.monotonic(), 1.0),
        )["attention", 0]  # fmt: skip
    for tokens in options.tokens:
        for row in rows_of(samples[tokens], options, tokens):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
