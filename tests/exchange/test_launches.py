# SPDX-License-Identifier: Apache-2.0
"""What only launched verbs have: receives that the host does not wait for, counts on the device, memory that stays
where it is, deadlines that are read when a launch runs. `test_graphs.py` has them in CUDA graphs.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import virtual_ranks
from bodies import SMALL, is_nan
from launched import Pair, on_devices, outputs_at_capacity
from small_case import IDS, TWO, WEIGHTS, X
from waits import SOON_S

import m2n


@on_devices
def test_a_receive_may_be_launched_without_a_wait_on_the_host(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO) as pair:
        addresses = set()
        for layer in range(3):
            pair.dispatch(layer=layer)
            for comm in pair.experts:
                batch = comm.dispatch_recv(layer, 0, linger_us=None, attention_ranks=[0], sync=False)
                assert batch.num_pairs == len(batch.row_index_by_expert) == 64 * SMALL.max_tokens * 2
                addresses.add(batch.row_index_by_expert.data_ptr())
                with pytest.raises(ValueError, match="'padded' needs counts on the host"):
                    batch.gather("padded")
                comm.combine_send(batch, outputs_at_capacity(batch, comm.placement.experts_of(comm.rank)))
            assert torch.equal(pair.comm.combine_recv(timeout=SOON_S).cpu(), pair.expected())
        assert len(addresses) == 2  # one a rank: fixed, as a graph needs it
        pair.dispatch(layer=3)
        batch = pair.experts[0].dispatch_recv(3, 0, linger_us=0, sync=False)
        assert batch.counts.tolist() == [1, 2, 3]  # tokens 0 and 2; experts 0 and 1, and one of the last token's
        with pytest.raises(m2n.SlotBusy, match="microbatch 0 is not answered.*combine_send first"):
            pair.experts[0].dispatch_recv(4, 0, linger_us=0, sync=False)
        with pytest.raises(ValueError, match="name layer and microbatch"):
            pair.experts[0].dispatch_recv(sync=False)


@on_devices
def test_a_launched_receive_that_gets_nothing_leaves_its_lists_empty(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        server = pair.experts[0]
        assert server.wait_peer(0, SOON_S)
        for options, words in (({"linger_us": 0}, "no attention rank"), ({}, "attention rank 7 has not connected")):
            if not options:
                pair.dispatch(layer=5)
                options = {"linger_us": None, "attention_ranks": [0, 7]}
            batch = server.dispatch_recv(5, 0, timeout=0.05, sync=False, **options)
            server.combine_send(batch, outputs_at_capacity(batch, range(4)))  # answers nobody
            pair.sync()
            assert batch.counts.tolist() == [0, 0, 0] and batch.expert_offsets.tolist() == [0] * 5
            with pytest.raises(m2n.Timeout, match=words):
                server.check()
            server.check()  # told once
        pair.answer(layer=5)  # what came is still there
        assert torch.equal(pair.comm.combine_recv(timeout=SOON_S).cpu(), pair.expected())


@on_devices
def test_a_launched_receive_refuses_what_it_does_not_host(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO, placement=m2n.Placement([[0], [1], [1], [1]])) as pair:
        pair.dispatch()  # asks rank 1 for expert 1
        for comm in pair.experts:
            comm.dispatch_recv(0, 0, linger_us=0, timeout=0.1, sync=False)
        pair.comm.combine_recv(timeout=0.2)
        pair.sync()
        with pytest.raises(m2n.ProtocolError, match="expert rank 1 does not host expert 1"):
            pair.check_past_a_timeout()


@on_devices
@pytest.mark.parametrize("count, dtype", [(0, torch.int32), (2, torch.int64), (3, torch.int32), (9, torch.int64)])
def test_the_number_of_tokens_may_lie_on_the_device(
    device: str, count: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    with Pair(tmp_path, device) as pair:
        num_tokens = torch.tensor([count], dtype=dtype, device=pair.where)
        route = pair.comm.route(pair.tensor(IDS), pair.tensor(WEIGHTS), num_tokens=num_tokens)
        used = min(count, 3)
        assert (route.num_tokens, route.num_rows) == (3, used)
        pair.comm.dispatch_send(pair.tensor(X), route)
        pair.answer()
        y = pair.comm.combine_recv().cpu()
        assert torch.equal(y[:used], pair.expected()[:used]) and not y[used:].any()
        with pytest.raises(ValueError, match="num_tokens: expected a tensor of one element"):
            pair.comm.route(
                pair.tensor(IDS), pair.tensor(WEIGHTS), num_tokens=torch.zeros(2, dtype=dtype, device=pair.where)
            )


@on_devices
def test_a_route_that_is_used_again_keeps_its_memory(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair, Pair(tmp_path, device, name="other") as other:
        route = pair.comm.route(pair.tensor(IDS[:0]), pair.tensor(WEIGHTS[:0]))
        for layer in range(3):
            assert pair.comm.route(pair.tensor(IDS), pair.tensor(WEIGHTS), out=route) is route
            pair.comm.dispatch_send(pair.tensor(X), route, layer=layer)
            pair.answer()
            assert torch.equal(pair.comm.combine_recv().cpu(), pair.expected())
        with pytest.raises(ValueError, match="out: it was made by another comm"):
            other.comm.route(pair.tensor(IDS), pair.tensor(WEIGHTS), out=route)


@on_devices
def test_another_deadline_holds_for_what_is_launched_from_then_on(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        pair.comm.set_timeout(0.05)
        pair.dispatch()
        began = time.monotonic()
        assert all(is_nan(pair.comm.combine_recv().cpu())) and time.monotonic() - began < SOON_S
        with pytest.raises(m2n.Timeout):
            pair.comm.check()
        with pytest.raises(ValueError, match="timeout: expected seconds > 0"):
            pair.comm.set_timeout(0)


@on_devices
def test_an_expert_rank_may_host_more_experts_than_a_block_can_count_for(device: str) -> None:
    shape = m2n.Shape(
        hidden=8, num_experts=260, top_k=5, max_tokens=31, dispatch_dtype="float32", combine_dtype="float32"
    )
    assert virtual_ranks.run(device, shape, m2n.Placement.block(260, 1), 2, 4) == 8
