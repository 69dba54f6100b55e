# SPDX-License-Identifier: Apache-2.0
"""Streams that wait for signals by themselves (`Config.stream_waits`): they wait for what comes next, round by round,
and the host ends what nobody else would. `test_device.py` runs over them too; `core/explorer/link.cc` has every order
of a wait that is ended.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import SMALL, is_nan
from conftest import over
from launched import Pair, config, on_devices, outputs_at_capacity
from small_case import IDS, TWO, WEIGHTS, X
from waits import SOON_S

import m2n
from m2n import testing
from m2n.ranks import run_ranks

pytestmark = over("stream-waits")


def counts_of(comm: Any) -> tuple[int, int]:
    """(waits of streams, words that the host ended)."""
    stats = comm.stats()
    return stats["stream_waits"], stats["stream_waits_ended"]


@on_devices
@pytest.mark.parametrize("first_seq", [0, 2**32 - 5])
def test_streams_wait_for_what_comes_next(device: str, first_seq: int) -> None:
    """Launched ahead by all ranks at once, across the wrap of the numbers: no wait is for too much, which the host
    would have to end."""
    shape = dataclasses.replace(SMALL, hidden=72)
    placement, num_attention, num_layers = m2n.Placement.block(4, 2), 2, 12
    microbatches = range(shape.microbatches)
    where = "cpu" if device == "emulated" else device

    def attention(comm: m2n.AttentionComm) -> tuple[int, int]:
        def workload(layer: int, microbatch: int) -> Any:
            kind = testing.KINDS[layer % len(testing.KINDS)]
            return testing.make_workload(shape, kind, 100 * layer + 10 * microbatch + comm.rank)

        results = []
        for layer in range(num_layers):
            for microbatch in microbatches:
                w = workload(layer, microbatch)
                route = comm.route(w.topk_ids.to(where), w.topk_weights.to(where))
                comm.dispatch_send(w.x.to(where), route, microbatch, layer)
            results += [comm.combine_recv(microbatch) for microbatch in microbatches]
        for i, y in enumerate(results):
            expected = testing.oracle_combine(workload(*divmod(i, shape.microbatches)), shape, placement, comm.rank)
            assert torch.equal(y.cpu(), expected)
        comm.check()
        return counts_of(comm)

    def expert(comm: m2n.ExpertComm) -> tuple[int, int]:
        assert all(comm.wait_peer(rank) for rank in range(num_attention))
        for layer in range(num_layers):
            for microbatch in microbatches:
                ranks = range(num_attention)
                batch = comm.dispatch_recv(layer, microbatch, linger_us=None, attention_ranks=ranks, sync=False)
                assert batch is not None
                comm.combine_send(batch, outputs_at_capacity(batch, placement.experts_of(comm.rank)))
        if where != "cpu":
            torch.cuda.current_stream().synchronize()
        comm.check()
        return counts_of(comm)

    testing.start_seq_at(first_seq)
    try:
        counts = run_ranks(
            (attention, expert), num_attention, 2, shape=shape, placement=placement, device=device, config=config()
        )
    finally:
        testing.start_seq_at(0)
    assert set(counts.values()) == {(num_layers * shape.microbatches, 0)}


@on_devices
def test_what_the_host_ends_is_not_lost(device: str, tmp_path: Path) -> None:
    """A reply that comes when its wait was ended is combined, and later waits are for the right one again."""
    with Pair(tmp_path, device, TWO) as pair:
        for layer in range(6):
            pair.dispatch(layer=layer)
            if layer == 2:
                assert all(is_nan(pair.comm.combine_recv(timeout=0.05).cpu()))
                assert counts_of(pair.comm) == (3, 2)  # both ranks' words
                for _ in pair.experts:
                    with pytest.raises(m2n.Timeout, match="is alive"):
                        pair.comm.check()
            pair.answer()
            assert torch.equal(pair.comm.combine_recv(timeout=SOON_S).cpu(), pair.expected())
        assert counts_of(pair.comm) == (7, 2)


@on_devices
def test_a_dispatch_that_gave_up_makes_no_wait_longer(device: str, tmp_path: Path) -> None:
    """Its stream would wait for the answer to what was never sent."""
    with Pair(tmp_path, device) as pair:
        nothing = torch.empty(0, SMALL.top_k)
        route = pair.comm.route(nothing.int().to(pair.where), nothing.to(pair.where))
        pair.comm.dispatch_send(torch.empty(0, SMALL.hidden, device=pair.where), route)
        pair.comm.set_timeout(0.05)
        pair.comm.combine_recv()  # of no rows, whose answer is late
        pair.dispatch()  # waits for that answer, and gives up
        pair.sync()
        with pytest.raises(m2n.Timeout, match="nothing was sent"):
            pair.comm.check()
        began = time.monotonic()
        assert all(is_nan(pair.comm.combine_recv(timeout=60.0).cpu()))
        assert time.monotonic() - began < SOON_S
        pair.answer()
        _, num_ended = counts_of(pair.comm)
        for layer in (1, 2):
            pair.dispatch(layer=layer)
            pair.answer()
            assert torch.equal(pair.comm.combine_recv(timeout=SOON_S).cpu(), pair.expected())
        assert counts_of(pair.comm)[1] == num_ended


@on_devices
def test_a_rank_that_joins_is_waited_for_from_its_first_round(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        server, ranks = pair.experts[0], [0]
        for layer in range(6):
            comms = [pair.comm]
            if layer == 2:
                late = m2n.AttentionComm(1, **pair.options)
                ranks = [0, 1]
            if layer >= 2:
                comms.append(late)
            for comm in comms:
                route = comm.route(pair.tensor(IDS), pair.tensor(WEIGHTS))
                comm.dispatch_send(pair.tensor(X), route, layer=layer)
            batch = server.dispatch_recv(layer, 0, linger_us=None, attention_ranks=ranks, sync=False)
            server.combine_send(batch, outputs_at_capacity(batch, range(4)))
            for comm in comms:
                assert torch.equal(comm.combine_recv().cpu(), pair.expected())
                comm.check()
        assert [counts_of(comm) for comm in (pair.comm, late, server)] == [(6, 0), (4, 0), (6, 0)]
        late.close()


@on_devices
def test_a_lost_rank_ends_the_waits_for_it(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO) as pair:
        pair.dispatch()
        threading.Timer(0.1, pair.experts[1]._native.drop_peer, (0,)).start()
        pair.experts[0].combine_send(batch := pair.experts[0].dispatch_recv(), testing.expert_outputs(batch, range(2)))
        began = time.monotonic()
        assert is_nan(pair.comm.combine_recv(timeout=60.0).cpu()) == [False, True, True]
        assert time.monotonic() - began < SOON_S
        assert counts_of(pair.comm) == (1, 1)
        with pytest.raises(m2n.PeerLost, match="expert rank 1 is lost"):
            pair.comm.check()


def test_windows_in_the_memory_of_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m2n.arrays, "device_name", str)
    monkeypatch.setattr(m2n.arrays, "is_capturing", lambda device: False)
    with pytest.raises(ValueError, match="config.stream_waits: the host must be able to end.*transport='shm'"):
        m2n.AttentionComm(0, SMALL, TWO, "/nowhere", "cuda:0", config=m2n.Config(transport="auto", stream_waits=True))
