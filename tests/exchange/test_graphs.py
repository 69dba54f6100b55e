# SPDX-License-Identifier: Apache-2.0
"""The verbs in CUDA graphs, captured in strict mode on both sides; and what their steady state asks of the CPU.

All of it needs a GPU: `make gpu` runs it there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import is_nan
from launched import config, outputs_at_capacity
from waits import SOON_S

import m2n
from m2n import testing

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(120)]

SHAPE = m2n.Shape(
    hidden=264, num_experts=8, top_k=3, max_tokens=24, microbatches=3,
    dispatch_dtype="bfloat16", combine_dtype="bfloat16",
)  # fmt: skip
NUM_ATTENTION, NUM_EXPERT = 2, 2
PLACED = m2n.Placement.block(SHAPE.num_experts, NUM_EXPERT)
NUM_WORKLOADS = 6


class Feed:
    """Workloads of one (attention rank, microbatch) on the GPU, the next one at each step; and what is wrong so far."""

    def __init__(self, rank: int, microbatch: int) -> None:
        kinds = [kind for kind in testing.KINDS if kind not in ("zero_tokens", "one_token")]
        given = [
            testing.make_workload(SHAPE, kinds[i % len(kinds)], 1000 * rank + 100 * microbatch + i)
            for i in range(NUM_WORKLOADS)
        ]
        expected = [testing.oracle_combine(w, SHAPE, PLACED, rank) for w in given]
        self.xs = torch.stack([w.x for w in given]).cuda()
        self.ids = torch.stack([w.topk_ids for w in given]).cuda()
        self.weights = torch.stack([w.topk_weights for w in given]).cuda()
        self.expected = torch.stack(expected).cuda()
        self.x, self.y = torch.empty_like(self.xs[0]), torch.empty_like(self.expected[0])
        self.step = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.num_wrong = torch.zeros(1, dtype=torch.int64, device="cuda")

    def now(self, of: torch.Tensor) -> torch.Tensor:
        return of.index_select(0, self.step)[0]

    def check(self) -> None:
        self.num_wrong += (self.y != self.now(self.expected)).any()
        self.step.add_(1).remainder_(NUM_WORKLOADS)


class Ranks:
    """Attention and expert ranks of one GPU, each with a stream, and the graphs that were captured on them."""

    def __init__(self, store: Path, **options: Any) -> None:
        patient = dataclasses.replace(config(), timeout_s=20.0)
        common = {"shape": SHAPE, "placement": PLACED, "store": store, "config": patient, "device": "cuda:0", **options}
        # One more may join.
        self.experts = [m2n.ExpertComm(rank, max_peers=NUM_ATTENTION + 1, **common) for rank in range(NUM_EXPERT)]
        self.attention = [m2n.AttentionComm(rank, **common) for rank in range(NUM_ATTENTION)]
        self.newcomer = functools.partial(m2n.AttentionComm, NUM_ATTENTION, **common)
        assert all(comm.wait_peer(rank) for comm in self.experts for rank in range(NUM_ATTENTION))
        self.streams = {comm: torch.cuda.Stream() for comm in (*self.attention, *self.experts)}
        self.feeds = {comm: [Feed(comm.rank, mb) for mb in range(SHAPE.microbatches)] for comm in self.attention}
        self.routes = {
            comm: [comm.route(feed.ids[0], feed.weights[0]) for feed in feeds] for comm, feeds in self.feeds.items()
        }
        for comm in self.experts:  # the lists of awaited ranks are allocated at their first use
            assert comm.dispatch_recv(0, 0, linger_us=None, attention_ranks=range(NUM_ATTENTION), timeout=0.01) is None
        torch.cuda.synchronize()

    def attention_layer(self, comm: m2n.AttentionComm, layer: int) -> None:
        for microbatch, (feed, route) in enumerate(zip(self.feeds[comm], self.routes[comm])):
            feed.x.copy_(feed.now(feed.xs))
            comm.route(feed.now(feed.ids), feed.now(feed.weights), out=route)
            comm.dispatch_send(feed.x, route, microbatch, layer)
        for microbatch, feed in enumerate(self.feeds[comm]):
            comm.combine_recv(microbatch, out=feed.y)
            feed.check()

    def expert_layer(self, comm: m2n.ExpertComm, layer: int) -> None:
        for microbatch in range(SHAPE.microbatches):
            batch = comm.dispatch_recv(
                layer, microbatch, linger_us=None, attention_ranks=range(NUM_ATTENTION), sync=False
            )
            comm.combine_send(batch, outputs_at_capacity(batch, PLACED.experts_of(comm.rank)))

    def capture(
        self, layer: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> list[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]]:
        """The layer of every rank as a graph of its own; nothing runs, but `meanwhile` in each."""
        graphs = []
        for comm, stream in self.streams.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
                (self.attention_layer if comm in self.attention else self.expert_layer)(comm, layer)
                meanwhile()
            graphs.append((graph, stream))
        return graphs

    def replay(self, graphs: list[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]]) -> None:
        for graph, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()

    def require_right(self) -> None:
        torch.cuda.synchronize()
        for comm in (*self.attention, *self.experts):
            comm.check()
        assert [int(feed.num_wrong) for feeds in self.feeds.values() for feed in feeds] == [0] * 6

    def close(self) -> None:
        torch.cuda.synchronize()
        for comm in self.streams:
            comm.close()


@contextlib.contextmanager
def ranks(store: Path, **options: Any) -> Iterator[Ranks]:
    made = Ranks(store, **options)
    try:
        yield made
    finally:
        made.close()


def test_a_layer_of_three_microbatches_is_replayed_10_000_times_with_changing_data(tmp_path: Path) -> None:
    with ranks(tmp_path) as made:
        graphs = made.capture(layer=3)
        for _ in range(10_000):
            made.replay(graphs)
        made.require_right()
        assert made.attention[0].stats()["messages_sent"] >= 10_000 * 3 * NUM_EXPERT
        assert made.attention[0].stats()["messages_received"] >= 10_000 * 3


def test_two_graphs_and_eager_calls_share_a_comm(tmp_path: Path) -> None:
    with ranks(tmp_path) as made:
        graphs = [made.capture(layer) for layer in (0, 7)]
        for i in range(300):
            made.replay(graphs[i % 3 % 2])
            if i % 50 == 49:
                for comm, stream in made.streams.items():
                    with torch.cuda.stream(stream):
                        (made.attention_layer if comm in made.attention else made.expert_layer)(comm, 2)
        made.require_right()


def test_a_rank_joins_while_another_thread_captures_a_graph(tmp_path: Path) -> None:
    """Its windows are mapped and its kernels loaded meanwhile, on both sides; the graphs hold nothing of that."""
    with ranks(tmp_path) as made, concurrent.futures.ThreadPoolExecutor(1) as another_thread:
        joined: list[m2n.AttentionComm] = []

        def join() -> None:
            if not joined:
                joined.append(another_thread.submit(made.newcomer).result(timeout=60))
                assert all(expert.wait_peer(NUM_ATTENTION) for expert in made.experts)

        graphs = made.capture(layer=1, meanwhile=join)
        with joined[0] as newcomer:
            for _ in range(10):
                made.replay(graphs)
            made.require_right()
            given = testing.make_workload(SHAPE, "uniform", 5)
            newcomer.dispatch_send(given.x.cuda(), newcomer.route(given.topk_ids.cuda(), given.topk_weights.cuda()))
            for expert in made.experts:
                batch = expert.dispatch_recv(0, 0, linger_us=None, attention_ranks=[NUM_ATTENTION])
                expert.combine_send(batch, testing.expert_outputs(batch, PLACED.experts_of(expert.rank)))
            expected = testing.oracle_combine(given, SHAPE, PLACED, NUM_ATTENTION)
            assert torch.equal(newcomer.combine_recv().cpu(), expected)
            newcomer.check()


def test_a_graph_gets_another_deadline_without_another_capture(tmp_path: Path) -> None:
    with ranks(tmp_path) as made:
        graphs = made.capture(layer=1)
        made.replay(graphs)
        made.require_right()
        only_attention = graphs[:NUM_ATTENTION]
        for comm in made.attention:
            comm.set_timeout(0.1)
        began = time.monotonic()
        made.replay(only_attention)
        torch.cuda.synchronize()
        assert time.monotonic() - began < SOON_S
        for comm in made.attention:
            assert all(is_nan(made.feeds[comm][0].y))
            for _ in range(NUM_EXPERT):
                with pytest.raises(m2n.Timeout, match="is alive but had not replied to layer 1"):
                    comm.check()
            comm.set_timeout(20.0)
        # The experts are there again: what was late is taken, and everything goes on.
        made.replay(graphs[NUM_ATTENTION:])
        for comm in made.attention:
            for microbatch in range(SHAPE.microbatches):
                assert not any(is_nan(comm.combine_recv(microbatch)))
        for feeds in made.feeds.values():
            for feed in feeds:
                feed.num_wrong.zero_()
        for _ in range(10):
            made.replay(graphs)
        made.require_right()


def test_what_a_capture_cannot_hold_is_refused_with_words(tmp_path: Path) -> None:
    with ranks(tmp_path) as made:
        comm, server = made.attention[0], made.experts[0]
        feed = made.feeds[comm][0]
        options = {"shape": SHAPE, "placement": PLACED, "store": tmp_path, "device": "cuda:0", "name": "late"}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            with pytest.raises(m2n.SetupError, match="memory cannot be allocated while a graph is captured.*out="):
                comm.route(feed.ids[0], feed.weights[0])
            with pytest.raises(m2n.SetupError, match="a comm cannot be made while a CUDA graph is captured"):
                m2n.ExpertComm(0, **options)
            with pytest.raises(m2n.SetupError, match="a graph cannot be captured while the host waits.*sync=False"):
                server.dispatch_recv(0, 0)
            with pytest.raises(m2n.SetupError, match="receive once with these attention_ranks before"):
                server.dispatch_recv(0, 0, linger_us=None, attention_ranks=[1], sync=False)
            with pytest.raises(ValueError, match="timeout: verbs of a captured graph have the comm's"):
                server.dispatch_recv(0, 0, linger_us=0, timeout=1, sync=False)
            feed.x.add_(0)  # the capture is still good
        graph.replay()
        made.replay(made.capture(layer=0))
        made.require_right()


def test_a_steady_state_asks_nothing_of_the_cpu_but_launches(tmp_path: Path) -> None:
    """No copy to the host and no call that waits, in more than 1,000 verbs."""
    with ranks(tmp_path) as made:

        def run_layers(num_layers: int) -> None:
            for layer in range(num_layers):
                for comm, stream in made.streams.items():
                    with torch.cuda.stream(stream):
                        (made.attention_layer if comm in made.attention else made.expert_layer)(comm, layer)

        run_layers(3)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run_layers(34)  # x 3 microbatches x (2 x 3 + 2 x 2) verbs
        names = [event.name for event in profile.events()]
        assert sum("verb_kernel" in name for name in names) >= 1000
        waits = [name for name in names if "ynchronize" in name]
        # The profiler itself waits for the device when it ends.
        assert len(waits) <= 1, waits
        assert not [name for name in names if "DtoH" in name or "HtoD" in name]
        made.require_right()
