# SPDX-License-Identifier: Apache-2.0
"""What the verbs take on one GPU beside its own limits, in one process: one attention rank and eight expert ranks as
streams. Part of `make gpu`; prints lines of JSON, each a row with its limit and goal where it has one.

Verbs are timed inside CUDA graphs, several of a kind in one, between two events; p50 and p99 are over replays.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import m2n
from m2n import testing
from m2n.benchmarks.gpu.copies import CopyExchange, Streams

NUM_RANKS = 8
CONFIG = m2n.Config(arrays="torch", timeout_s=20.0)
WARM_UP = 5


def emit(name: str, samples: list[float], num_bytes: int = 0, **more: Any) -> float:
    """Prints a row; its median. Of `limit_us` the ratio to it is noted, of `goal` whether it is met."""
    samples = sorted(samples)
    more = {key: value for key, value in more.items() if value is not None}
    p50, p99 = samples[len(samples) // 2], samples[min(len(samples) - 1, round(0.99 * len(samples)))]
    row = {"name": name, "bytes": num_bytes, "samples": len(samples), "p50_us": round(p50, 3), "p99_us": round(p99, 3)}
    if "limit_us" in more:
        more["limit_us"] = round(more["limit_us"], 3)
        row["ratio"] = round(p50 / more["limit_us"], 3)
    print(json.dumps({**row, **more}), flush=True)
    return p50


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a graph. It has run before: nothing is loaded or allocated for the first time in there."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        work()
    return graph


def repeat(times: int, work: Callable[..., None], *arguments: Any) -> None:
    for _ in range(times):
        work(*arguments)


def host_us(work: Callable[[], None]) -> float:
    """Of one run, its end on the device included."""
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began)


class Clock:
    """Times what is enqueued on the current stream, by two events."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def us(self, work: Callable[[], None]) -> float:
        self._events[0].record()
        work()
        self._events[1].record()
        self._events[1].synchronize()
        return 1e3 * self._events[0].elapsed_time(self._events[1])


def times_of(
    work: Callable[[], None], repeats: int, per: int = 1, behind: Callable[[], None] | None = None
) -> list[float]:
    """Microseconds of each of `repeats` runs, divided by `per`; what is `behind` runs untimed after each."""
    return times_in_turn({"": work}, repeats, per, None if behind is None else {"": behind})[""]


def times_in_turn(
    works: dict[str, Callable[[], None]], repeats: int, per: int = 1,
    behind: dict[str, Callable[[], None]] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """As times_of() for each of `works`, which take turns."""
    clock, samples = Clock(), {name: [] for name in works}
    for i in range(repeats + WARM_UP):
        for name, work in works.items():
            us = clock.us(work) / per
            if behind is not None:
                behind[name]()
                torch.cuda.synchronize()
            if i >= WARM_UP:
                samples[name].append(us)
    return samples


@functools.cache
def side_streams() -> list[torch.cuda.Stream]:
    """One for each expert rank. Made once: torch has 32, and gives them out again."""
    return [torch.cuda.Stream() for _ in range(NUM_RANKS)]


@dataclasses.dataclass
class Side:
    """An expert rank, its stream, and results for its pairs, as if computed."""

    comm: m2n.ExpertComm
    stream: torch.cuda.Stream
    y: torch.Tensor


class Bench:
    """One attention rank, eight expert ranks, `microbatches` slots; T tokens of 7168 bfloat16, top-8 of 64 experts."""

    def __init__(
        self, store: str, num_tokens: int, microbatches: int, hidden: int = 7168, config: m2n.Config = CONFIG,
        dispatch_dtype: str = "bfloat16",
    ) -> None:  # fmt: skip
        self.shape = m2n.Shape(
            hidden=hidden, num_experts=64, top_k=8, max_tokens=num_tokens, microbatches=microbatches,
            dispatch_dtype=dispatch_dtype, combine_dtype="bfloat16",
        )  # fmt: skip
        self.placement = m2n.Placement.block(64, NUM_RANKS)
        name = f"{num_tokens}-{microbatches}-{config.stream_waits}-{dispatch_dtype}"
        options = {"shape": self.shape, "placement": self.placement, "store": store, "name": name,
                   "device": "cuda:0", "config": config}  # fmt: skip
        comms = [m2n.ExpertComm(rank, max_peers=1, **options) for rank in range(NUM_RANKS)]
        self.attention = m2n.AttentionComm(0, max_peers=NUM_RANKS, **options)
        assert all(comm.wait_peer(0) for comm in comms)
        pairs = num_tokens * self.shape.top_k  # capacity of a batch
        y = torch.randn(pairs, hidden, device="cuda").to(torch.bfloat16)
        self.sides = [Side(comm, stream, y) for comm, stream in zip(comms, side_streams())]
        workload = testing.make_workload(self.shape, "uniform", 1)
        self.x, self.ids, self.weights = (t.cuda() for t in (workload.x, workload.topk_ids, workload.topk_weights))
        self.routes = [self.attention.route(self.ids, self.weights) for _ in range(microbatches)]
        self.results = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device="cuda")
        self.row_bytes = 2 * hidden
        self.num_rows = self.routes[0].num_rows
        self.num_bytes = self.num_rows * self.row_bytes

    def close(self) -> None:
        torch.cuda.synchronize()
        for comm in (self.attention, *(side.comm for side in self.sides)):
            comm.check()
            comm.close()

    def route(self) -> None:
        for route in self.routes:
            self.attention.route(self.ids, self.weights, out=route)

    def send(self, num_sms: int | None = None) -> None:
        for microbatch, route in enumerate(self.routes):
            self.attention.dispatch_send(self.x, route, microbatch, num_sms=num_sms)

    def receive(self) -> None:
        self.batches = [
            (side, side.comm.dispatch_recv(0, microbatch, linger_us=None, attention_ranks=[0], sync=False))
            for microbatch in range(self.shape.microbatches)
            for side in self.sides
        ]

    def answer(self, num_sms: int | None = None) -> None:
        for side, batch in self.batches:
            side.comm.combine_send(batch, side.y, num_sms=num_sms)

    def combine(self, num_sms: int | None = None) -> None:
        for microbatch in range(self.shape.microbatches):
            self.attention.combine_recv(microbatch, out=self.results, num_sms=num_sms)

    def round_trip(self, num_sms: int | None = None) -> None:
        """Of one microbatch, every expert rank on its own stream, from the start: they wait for their signals."""
        self.round_trip_behind(None, num_sms)

    def round_trip_behind(self, work: Callable[[], object] | None, num_sms: int | None = None) -> None:
        """`work` comes when all expert ranks wait, before anything is sent."""
        here = torch.cuda.current_stream()
        for side in self.sides:
            side.stream.wait_stream(here)
            with torch.cuda.stream(side.stream):
                batch = side.comm.dispatch_recv(0, 0, linger_us=None, attention_ranks=[0], sync=False)
                side.comm.combine_send(batch, side.y, num_sms=num_sms)
        if work is not None:
            work()
        self.attention.route(self.ids, self.weights, out=self.routes[0])
        self.attention.dispatch_send(self.x, self.routes[0], 0, num_sms=num_sms)
        self.attention.combine_recv(0, out=self.results, num_sms=num_sms)
        for side in self.sides:
            here.wait_stream(side.stream)

    def rank_of_pair(self) -> torch.Tensor:
        """The expert rank of each (token, k)."""
        return (torch.arange(64, device="cuda") // (64 // NUM_RANKS))[self.ids]

    def in_copies(self, streams: Streams) -> CopyExchange:
        """The same bytes there and back by cudaMemcpyAsync; nobody gathers or sums."""
        of_pair = self.rank_of_pair()
        return CopyExchange([[self.x[(of_pair == rank).any(1)] for rank in range(NUM_RANKS)]], streams)

    def in_torch(self) -> Callable[[], None]:
        """The same bytes and sums with index_select, copies and index_add; the lists are made before."""
        of_pair = self.rank_of_pair()
        moves = []
        for rank, side in enumerate(self.sides):
            tokens = (of_pair == rank).any(1).nonzero()[:, 0]
            row_of_token = torch.zeros(len(self.x), dtype=torch.int64, device="cuda")
            row_of_token[tokens] = torch.arange(len(tokens), device="cuda")
            pair_token, pair_k = (of_pair == rank).nonzero(as_tuple=True)
            weight = self.weights[pair_token, pair_k][:, None]
            window = torch.empty(len(tokens), self.x.shape[1], dtype=torch.bfloat16, device="cuda")
            moves.append((side, tokens, row_of_token[pair_token], weight, side.y[: len(pair_token)], window,
                          torch.empty_like(window)))  # fmt: skip

        def run() -> None:
            here = torch.cuda.current_stream()
            for side, tokens, rows, weight, y, window, replies in moves:
                side.stream.wait_stream(here)
                with torch.cuda.stream(side.stream):
                    window.copy_(self.x.index_select(0, tokens))
                    partial = torch.zeros(window.shape, device="cuda").index_add_(0, rows, weight * y)
                    replies.copy_(partial)
                here.wait_stream(side.stream)
            total = torch.zeros(self.x.shape, device="cuda")
            for _, tokens, _, _, _, _, replies in moves:
                total.index_add_(0, tokens, replies.float())
            self.results.copy_(total)

        return run


def time_limits() -> float:
    """Launches; the median time of an empty kernel in a graph."""
    word = torch.zeros(1, device="cuda")
    graph = capture(lambda: [word.zero_() for _ in range(100)])
    kernel_us = emit("a kernel that stores one word, in a graph", times_of(graph.replay, 50, per=100))
    emit("a kernel that stores one word, by events", times_of(word.zero_, 100))
    return kernel_us


def copy_us(num_bytes: int, count: int = 8) -> float:
    """cudaMemcpyAsync of so many bytes on the device, over `count` pairs of buffers in turn, in a graph."""
    pairs = [torch.empty(2, num_bytes, dtype=torch.uint8, device="cuda") for _ in range(count)]
    graph = capture(lambda: [pair[1].copy_(pair[0]) for pair in pairs])
    samples = times_of(graph.replay, 60, per=count)
    return emit("copy on the device, cudaMemcpyAsync, in a graph", samples, num_bytes)


def time_verbs(store: str, kernel_us: float, num_tokens: int, sms: list[int]) -> None:
    """Each verb in a graph of its own, eight microbatches in each; dispatch and combine also by num_sms."""
    bench = Bench(store, num_tokens, microbatches=8)
    num_bytes, top = bench.num_bytes, f"{num_tokens} x 7168 bf16, top-8, 8 ranks"
    limit_us = copy_us(num_bytes) + kernel_us
    reduce_us = copy_us((bench.num_rows + num_tokens) * bench.row_bytes // 2) + kernel_us
    bench.route(), bench.send(), bench.receive(), bench.answer(), bench.combine()
    goal = "at most 1.3 of the limit" if num_tokens == 128 else None
    for num_sms in sms:
        # Captured in the order in which they run: the host follows the slots.
        stages = {
            "route": capture(bench.route),
            "dispatch_send": capture(partial(bench.send, num_sms)),
            "dispatch_recv": capture(bench.receive),
            "combine_send": capture(partial(bench.answer, num_sms)),
            "combine_recv": capture(partial(bench.combine, num_sms)),
        }
        samples = times_in_turn({name: graph.replay for name, graph in stages.items()}, 60, per=8)
        for name in ("dispatch_recv", "combine_send"):  # of each rank
            samples[name] = [us / NUM_RANKS for us in samples[name]]
        if num_sms == sms[0]:
            emit(f"route, {top}", samples["route"])
            emit(f"dispatch_recv, of one of 8 ranks, {top}", samples["dispatch_recv"])
        emit(f"dispatch_send, {top}, num_sms={num_sms}", samples["dispatch_send"], num_bytes, limit_us=limit_us,
             limit="copy of the same bytes + one kernel", goal=goal)  # fmt: skip
        emit(f"combine_send, of one of 8 ranks, {top}, num_sms={num_sms}", samples["combine_send"],
             num_bytes // NUM_RANKS)  # fmt: skip
        emit(f"combine_recv, {top}, num_sms={num_sms}", samples["combine_recv"], num_bytes, limit_us=reduce_us,
             limit="copy of half the bytes read and written + one kernel")  # fmt: skip
    bench.close()


def time_large(store: str) -> None:
    """One dispatch of 4,096 tokens against the copy bandwidth."""
    bench = Bench(store, 4096, microbatches=1)
    limit_us = copy_us(bench.num_bytes, count=2)
    bench.send(), bench.receive(), bench.answer(), bench.combine()
    for num_sms in (64, 132):
        send = capture(partial(bench.send, num_sms))
        rest = capture(lambda: (bench.receive(), bench.answer(132), bench.combine(132)))
        emit(f"dispatch_send, 4096 x 7168 bf16, top-8, 8 ranks, num_sms={num_sms}",
             times_of(send.replay, 20, behind=rest.replay), bench.num_bytes, limit_us=limit_us,
             limit="copy of the same bytes", goal="at most 1.11 of the limit: 0.9 of its bandwidth")  # fmt: skip
    bench.close()


def time_float8(store: str) -> None:
    """What rows of float8, quantised on the way, save a dispatch."""
    row_bytes = {"bfloat16": 2 * 7168, "float8_e4m3fn": 7168 + 4 * (7168 // 128)}
    for num_tokens in (128, 4096):
        benches = {dtype: Bench(store, num_tokens, 1, dispatch_dtype=dtype) for dtype in row_bytes}
        sends: dict[str, Callable[[], None]] = {}
        rests: dict[str, Callable[[], None]] = {}
        for dtype, bench in benches.items():
            bench.send(), bench.receive(), bench.answer(), bench.combine()
            sends[dtype] = capture(bench.send).replay
            rests[dtype] = capture(lambda bench=bench: (bench.receive(), bench.answer(), bench.combine())).replay
        samples, limit_us = times_in_turn(sends, 40, behind=rests), None
        for dtype, bench in benches.items():
            us = emit(f"dispatch_send in {dtype}, {num_tokens} x 7168, top-8, 8 ranks, num_sms=64", samples[dtype],
                      bench.num_rows * row_bytes[dtype], limit_us=limit_us,
                      limit=limit_us and "the same in bfloat16")  # fmt: skip
            limit_us = limit_us or us
            bench.close()


def time_round_trips(store: str) -> None:
    """Whole round trips in graphs and eager, against torch's own operations, and against copies and events."""
    streams = Streams(1 + NUM_RANKS, "cuda")
    for num_tokens in (1, 8, 128):
        bench = Bench(store, num_tokens, microbatches=1)
        copies = bench.in_copies(streams)
        works = {"m2n": bench.round_trip, "torch": bench.in_torch(), "copies": copies.round_trip}
        for work in works.values():
            work()
        torch.cuda.synchronize()
        graphs = {name: capture(work).replay for name, work in works.items()}
        samples = times_in_turn(graphs, 1000)
        assert all(map(torch.equal, copies.sources[0], copies.replies[0]))
        size = f"{num_tokens} x 7168 bf16, top-8, 8 ranks"
        torch_us = emit(f"round trip in torch, index_select + copies, graph, {size}", samples["torch"])
        copies_us = emit(f"round trip, cudaMemcpyAsync + events, neither gathers nor sums, graph, {size}",
                         samples["copies"], 2 * bench.num_bytes)  # fmt: skip
        emit(f"round trip, graph, {size}", samples["m2n"], 2 * bench.num_bytes, limit_us=torch_us,
             limit="the same in torch", goal="at most 0.33 of torch; p99/p50 at most 1.2",
             copies_us=round(copies_us, 3))  # fmt: skip
        replayed = [host_us(graphs["m2n"]) for _ in range(60)][10:]
        replayed_us = emit(f"round trip, graph, host clock, {size}", replayed, 2 * bench.num_bytes)
        eager = [host_us(bench.round_trip) for _ in range(60)][10:]
        emit(f"round trip, eager, host clock, {size}", eager, 2 * bench.num_bytes, limit_us=replayed_us,
             limit="the graph", goal="the graph at least 1.5 x better" if num_tokens < 128 else None)  # fmt: skip
        bench.close()


def time_gemm_beside(store: str) -> None:
    """How much a matrix product beside slows down while round trips go on, and they beside it."""
    bench = Bench(store, 128, microbatches=1)
    a, b = (torch.randn(4096, 4096, device="cuda").to(torch.bfloat16) for _ in range(2))
    out, other = torch.empty_like(a), torch.cuda.Stream()
    products = 40

    def multiply() -> None:
        for _ in range(products):
            torch.matmul(a, b, out=out)

    multiply()
    alone_us = emit("matrix product 4096^3 bf16, alone", times_of(multiply, 10, per=products))
    for num_sms in (8, 16, 32, 64, 132):
        with torch.cuda.stream(other):
            bench.round_trip(num_sms)
        torch.cuda.synchronize()
        graph = capture(partial(repeat, 20, bench.round_trip, num_sms))
        trips_alone = times_of(graph.replay, 5, per=20)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(other):
            begin.record()
            for _ in range(120):
                graph.replay()
            end.record()
        beside = times_of(multiply, 4, per=products)[:4]
        torch.cuda.synchronize()
        trip_us = 1e3 * begin.elapsed_time(end) / 2400
        name = f"matrix product beside round trips of 128 tokens, num_sms={num_sms}"
        emit(name, beside, limit_us=alone_us, limit="alone",
             round_trip_us=round(trip_us, 2), round_trip_alone_us=round(sorted(trips_alone)[2], 2))  # fmt: skip
    bench.close()


def main() -> None:
    """Runs everything, about 40 s."""
    torch.cuda.set_stream(torch.cuda.Stream())
    with tempfile.TemporaryDirectory(prefix="m2n-") as store:
        kernel_us = time_limits()
        time_verbs(store, kernel_us, 128, [16, 32, 64, 132])
        time_verbs(store, kernel_us, 8, [64])
        time_large(store)
        time_float8(store)
        time_round_trips(store)
        time_gemm_beside(store)


if __name__ == "__main__":
    sys.exit(main())
