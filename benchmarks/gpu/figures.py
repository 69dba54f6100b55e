# SPDX-License-Identifier: Apache-2.0
"""Figures 11 and 12 of MegaScale-Infer in the shape that one GPU allows. Part of `make gpu`; prints lines of JSON.

M attention and N expert ranks are streams of one process on one GPU. A dispatch moves the same number of bytes between
each two of them: every token goes to every expert rank, one expert each, as in `m2n-bench paper`. Its time begins when
all ranks may start and ends when the last expert rank has its batch: rows, ids, weights and index lists. Figure 11 is
8 x 8 over the bytes of a pair, figure 12 256 KB over the numbers of ranks; p50 and p99 are over dispatches. In turn
with m2n, in the same process: the rows by cudaMemcpyAsync with an event for each pair, and the limit, one copy of all
bytes, which reads each of them from memory once, where the other two may find a token in the L2 cache again. On a GPU
each is a CUDA graph, enqueued before the device gets to it.

What it says: how the time of signals, waits and index lists grows with ranks and bytes, beside what else one GPU has.
What it does not: anything of a network. All ranks share one memory, one cache and the multiprocessors, so bandwidth
does not grow with ranks, no link is congested, no rank is another machine, and the time is of all ranks together. The
paper's figures compare with NCCL between GPUs of several hosts; no ratio here is one of theirs.

`--device emulated` runs the same on the threads of a CPU, to see that it works: its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import m2n
from m2n.benchmarks.gpu.copies import CopyExchange, Streams
from m2n.benchmarks.gpu.verbs import WARM_UP, capture, emit

KB, MB = 1 << 10, 1 << 20
MAX_ROW_BYTES = 8192  # as m2n-bench paper has them
SIZES = (KB, 8 * KB, 64 * KB, 256 * KB, MB, 8 * MB)
RANKS = ("4x4", "8x8", "4x8", "8x4", "4x16", "16x4")
QUICK_SIZES, QUICK_RANKS = (KB, 16 * KB), ("1x2", "2x1")
TIMEOUT_S = 5.0
# The host enqueues what is timed while the device sleeps for so long: about 0.3 ms.
SLEEP_CYCLES = 500_000


class Timer:
    """Times what runs in turn on the current stream, by events; on a CPU by the clock."""

    def __init__(self, device: str) -> None:
        self.is_gpu = torch.device(device).type == "cuda"
        self._marks: dict[str, tuple[Any, Any]] = {}

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, which has run before, in the form that is timed."""
        return capture(work).replay if self.is_gpu else work

    def begin_round(self) -> None:
        self._marks = {}
        if self.is_gpu:
            torch.cuda._sleep(SLEEP_CYCLES)

    def run(self, name: str, work: Callable[[], None]) -> None:
        begin = self._mark()
        work()
        self._marks[name] = begin, self._mark()

    def end_round(self) -> dict[str, float]:
        """Microseconds by name."""
        if not self.is_gpu:
            return {name: 1e6 * (end - begin) for name, (begin, end) in self._marks.items()}
        torch.cuda.synchronize()
        return {name: 1e3 * begin.elapsed_time(end) for name, (begin, end) in self._marks.items()}

    def _mark(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Exchange:
    """M x N ranks of m2n. An expert rank answers with the rows it got, each attention rank sums N copies of them."""

    def __init__(
        self, store: str, m: int, n: int, pair_bytes: int, device: str, streams: Streams, num_sms: int
    ) -> None:
        if n & (n - 1):
            raise ValueError(f"{m}x{n}: N is a power of two, so that weights of 1/N sum to 1 without rounding")
        row_bytes = min(pair_bytes, MAX_ROW_BYTES)
        self.m, self.n, self.streams, self.num_sms = m, n, streams, num_sms
        self.num_tokens, hidden = pair_bytes // row_bytes, row_bytes // 2
        self.num_bytes = m * n * pair_bytes
        shape = m2n.Shape(
            hidden=hidden, num_experts=n, top_k=n, max_tokens=self.num_tokens, dispatch_dtype="bfloat16",
            combine_dtype="bfloat16",
        )  # fmt: skip
        common: dict[str, Any] = {
            "shape": shape, "placement": m2n.Placement.block(n, n), "store": store, "device": device,
            "config": m2n.Config(arrays="torch", timeout_s=TIMEOUT_S, connect_timeout_s=4 * TIMEOUT_S),
        }  # fmt: skip
        with contextlib.ExitStack() as opened:
            self.experts = [opened.enter_context(m2n.ExpertComm(k, max_peers=m, **common)) for k in range(n)]
            self.attention = [opened.enter_context(m2n.AttentionComm(r, max_peers=n, **common)) for r in range(m)]
            if not all(comm.wait_peer(r) for comm in self.experts for r in range(m)):
                raise RuntimeError("not all attention ranks have connected")
            self._opened = opened.pop_all()
        where = "cpu" if device == "emulated" else device
        self.xs = [torch.empty(self.num_tokens, hidden, dtype=torch.bfloat16, device=where) for _ in range(m)]
        self.got = [torch.empty(m * self.num_tokens, hidden, dtype=torch.bfloat16, device=where) for _ in range(n)]
        self.results = [torch.empty_like(x) for x in self.xs]
        ids = torch.arange(n, device=where).repeat(self.num_tokens, 1)
        weights = torch.full((self.num_tokens, n), 1 / n, device=where)
        self.routes = [comm.route(ids, weights) for comm in self.attention]
        self.renew()

    def renew(self) -> None:
        """Other rows, and nothing that was left by those before."""
        for x in self.xs:
            x.copy_(torch.randn(x.shape))
        for tensor in (*self.got, *self.results):
            tensor.fill_(float("nan"))

    def dispatch(self) -> None:
        """Expert ranks do not wait for the streams of the senders, but for their signals."""
        self.streams.fork()
        for r, comm in enumerate(self.attention):
            with self.streams.on(r):
                comm.dispatch_send(self.xs[r], self.routes[r], num_sms=self.num_sms)
        self.batches = []
        for k, comm in enumerate(self.experts):
            with self.streams.on(self.m + k):
                batch = comm.dispatch_recv(0, 0, linger_us=None, attention_ranks=range(self.m), sync=False)
                self.batches.append(batch)
        self.streams.join()

    def answer(self) -> None:
        self.streams.fork()
        for k, (comm, batch) in enumerate(zip(self.experts, self.batches)):
            with self.streams.on(self.m + k):
                torch.index_select(batch.x, 0, batch.row_index_by_expert, out=self.got[k])
                comm.combine_send(batch, self.got[k], num_sms=self.num_sms)
        for r, comm in enumerate(self.attention):
            with self.streams.on(r):
                comm.combine_recv(out=self.results[r], num_sms=self.num_sms)
        self.streams.join()

    def check(self) -> None:
        """Raises what a launch has found."""
        for comm in (*self.attention, *self.experts):
            comm.check()

    def require_right(self) -> None:
        """Each expert rank got the rows of all attention ranks, in the order of their joining, and all came back."""
        self.check()
        sent = torch.cat(self.xs)
        if not all(torch.equal(got, sent) for got in self.got):
            raise RuntimeError("m2n: an expert rank did not get the rows that were sent")
        if not all(torch.equal(result, x) for result, x in zip(self.results, self.xs)):
            raise RuntimeError("m2n: the rows that came back are not those that were sent")

    def close(self) -> None:
        self._opened.close()


class Case:
    """m2n, copies with events, and one copy of all bytes, each ready to be timed in turn."""

    def __init__(self, exchange: Exchange, timer: Timer) -> None:
        self.exchange, self.timer = exchange, timer
        sources = [[x] * exchange.n for x in exchange.xs]
        self.copies = CopyExchange(sources, exchange.streams)
        where = exchange.xs[0].device
        self.source, self.target = torch.zeros(2, exchange.num_bytes, dtype=torch.uint8, device=where)
        # Also loads and allocates what a graph must find done.
        for work in (exchange.dispatch, exchange.answer, self.copy_rows, self.copy_all):
            work()
        if timer.is_gpu:
            torch.cuda.synchronize()
        # Captured in the order in which they run: the host follows the slots.
        self.dispatch, self.answer = timer.prepare(exchange.dispatch), timer.prepare(exchange.answer)
        self.works = {"copies": timer.prepare(self.copy_rows), "limit": timer.prepare(self.copy_all)}

    def copy_rows(self) -> None:
        self.exchange.streams.fork()
        self.copies.dispatch()
        self.exchange.streams.join()

    def copy_all(self) -> None:
        self.target.copy_(self.source)

    def round(self) -> dict[str, float]:
        """Microseconds of each contender."""
        self.timer.begin_round()
        self.timer.run("m2n", self.dispatch)
        self.answer()
        for name, work in self.works.items():
            self.timer.run(name, work)
        return self.timer.end_round()

    def measure(self, rounds: int, seconds: float) -> dict[str, list[float]]:
        """Rounds until there are enough or the time is over, and one more with other rows, which are compared."""
        samples: dict[str, list[float]] = {}
        began = time.monotonic()
        for i in range(rounds + WARM_UP):
            times = self.round()
            self.exchange.check()  # a stall ends the case, not every round of it
            for name, us in times.items():
                if i >= WARM_UP:
                    samples.setdefault(name, []).append(us)
            if samples and time.monotonic() - began > seconds:
                break
        self.exchange.renew()
        self.round()
        self.exchange.require_right()
        for x, windows in zip(self.exchange.xs, self.copies.windows):
            if not all(torch.equal(window, x) for window in windows):
                raise RuntimeError("copies: a window does not hold the rows that were sent")
        return samples


def report(figure: int, case: Case, pair_bytes: int, samples: dict[str, list[float]]) -> None:
    """The lines of a case, the limit's first."""
    exchange = case.exchange
    place = f"{exchange.m} x {exchange.n} ranks as {'streams' if case.timer.is_gpu else 'emulated, on CPU threads'}"
    size = f"{pair_bytes // MB} MB" if pair_bytes >= MB else f"{pair_bytes // KB} KB"
    limit, p50 = "one copy of all bytes", {name: statistics.median_high(each) for name, each in samples.items()}
    names = {"limit": limit, "copies": "cudaMemcpyAsync + an event a pair", "m2n": f"m2n, num_sms={exchange.num_sms}"}
    for key, name in names.items():
        beside = {} if key == "limit" else {"limit_us": p50["limit"], "limit": limit}
        emit(
            f"figure {figure}: dispatch, {place}, {size} a pair, {name}", samples[key], exchange.num_bytes,
            figure=figure, contender=key, m=exchange.m, n=exchange.n, pair_bytes=pair_bytes,
            gb_per_s=round(exchange.num_bytes / p50[key] / 1e3, 3), **beside,
        )  # fmt: skip


def run_case(figure: int, m: int, n: int, pair_bytes: int, streams: Streams, options: argparse.Namespace) -> None:
    timer = Timer("cpu" if options.device == "emulated" else options.device)
    num_sms = options.num_sms
    if num_sms is None:
        num_sms = torch.cuda.get_device_properties(options.device).multi_processor_count // m if timer.is_gpu else 1
    with tempfile.TemporaryDirectory(prefix="m2n-") as store:
        exchange = Exchange(store, m, n, pair_bytes, options.device, streams, num_sms)
        try:
            case = Case(exchange, timer)
            report(figure, case, pair_bytes, case.measure(options.rounds, options.seconds))
        finally:
            exchange.close()


def numbers_of(text: str) -> tuple[int, int]:
    """M and N of a text as 4x16."""
    m, n = map(int, text.split("x"))
    return m, n


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:0 or emulated (default cuda:0)")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that everything runs")
    parser.add_argument(
        "--figure-11-ranks", default="8x8", help="as MxN; each one waits in its own block (default 8x8)"
    )
    parser.add_argument("--num-sms", type=int, help="blocks of a verb (default: the multiprocessors, shared among M)")
    parser.add_argument("--rounds", type=int, default=300, help="dispatches of a case, at most (default 300)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of a case, at most (default 1.5)")
    parser.add_argument("--deadline", type=float, default=50.0, help="seconds; no case begins later (default 50)")
    options = parser.parse_args()
    if options.quick:
        options.figure_11_ranks, options.rounds = "2x2", min(options.rounds, 5)
    return options


def main() -> int:
    """The command line; 1 where a case failed or was left out."""
    options, began, num_missing = parse(), time.monotonic(), 0
    square = numbers_of(options.figure_11_ranks)
    cases = [(11, *square, size) for size in (QUICK_SIZES if options.quick else SIZES)]
    cases += [(12, *numbers_of(ranks), 256 * KB) for ranks in (QUICK_RANKS if options.quick else RANKS)]
    if options.device == "emulated":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_stream(torch.cuda.Stream(options.device))
    streams = Streams(max(m + n for _, m, n, _ in cases), "cpu" if options.device == "emulated" else options.device)
    for case in cases:
        reason = None
        if time.monotonic() - began > options.deadline:
            reason = f"{options.deadline:.0f} s are over"
        else:
            try:
                run_case(*case, streams, options)
            except (m2n.Error, RuntimeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            num_missing += 1
            figure, m, n, size = case
            print(f"figure {figure}, {m} x {n}, {size} bytes a pair: not run: {reason}", flush=True)
    return int(num_missing > 0)


if __name__ == "__main__":
    sys.exit(main())
