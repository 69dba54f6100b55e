# SPDX-License-Identifier: Apache-2.0
"""What holds for comms whose verbs are launched: troubles are told by the next call, everything else goes on.

On `emulated` the launches run on CPU threads; on `cuda:0` they are kernels.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
import types
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
import torch
import virtual_ranks
from bodies import ONE, SMALL, is_nan
from conftest import over
from launched import Pair, config, on_devices
from small_case import IDS, TWO, WEIGHTS, X
from waits import SOON_S

import m2n
from m2n import arrays, testing
from m2n.testing import expert_outputs

pytestmark = over("auto", "stream-waits", "tcp", "ucx")


@on_devices
def test_all_ranks_in_one_thread_equal_the_oracle(device: str) -> None:
    shape = dataclasses.replace(SMALL, hidden=72, microbatches=3)
    assert virtual_ranks.run(device, shape, m2n.Placement.block(4, 2), 3, 12, config()) == 36


@on_devices
def test_a_late_reply_is_nan_and_a_timeout_of_the_next_call_and_can_be_combined_again(
    device: str, tmp_path: Path
) -> None:
    with Pair(tmp_path, device) as pair:
        pair.dispatch()
        assert not pair.comm.ready(0) and pair.comm.ready(1)  # a launch never waits on the host
        assert pair.comm.wait_ready([0, 1]) == 1 and pair.comm.wait_ready([0], timeout=0.01) is None
        with pytest.raises(ValueError, match="microbatch: expected 0 to 1, got 2"):
            pair.comm.ready(2)
        assert all(is_nan(pair.comm.combine_recv(timeout=0.05).cpu()))
        with pytest.raises(m2n.Timeout, match=r"combine_recv\(microbatch=0\): expert rank 0 is alive") as caught:
            pair.comm.combine_recv()
        assert caught.value.peer == 0
        pair.comm.check()  # told once
        with pytest.raises(m2n.SlotBusy, match="microbatch 0 is in flight"):
            pair.dispatch()
        pair.answer()
        assert pair.comm.wait_ready([0], timeout=SOON_S) == 0
        assert pair.comm.wait_ready([0, 1]) == 0 and pair.comm.wait_ready([1, 0]) == 1  # the first in the given order
        assert torch.equal(pair.comm.combine_recv().cpu(), pair.expected())
        pair.dispatch(layer=1)
        pair.answer()
        assert torch.equal(pair.comm.combine_recv().cpu(), pair.expected())


@on_devices
def test_a_lost_rank_leaves_nan_in_its_rows_and_the_others_go_on(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO) as pair:
        pair.dispatch()
        pair.experts[1]._native.drop_peer(0)  # it cuts the link: a loss for the attention rank
        kept = pair.experts[:1]
        pair.experts, gone = kept, pair.experts[1]
        pair.answer()
        y = pair.comm.combine_recv(timeout=SOON_S).cpu()
        # IDS: token 0 goes to rank 0 only, token 1 to rank 1 only, token 2 to both.
        assert is_nan(y) == [False, True, True]
        with pytest.raises(m2n.PeerLost, match="expert rank 1 is lost") as caught:
            pair.dispatch(microbatch=1)
        assert caught.value.peer == 1
        pair.comm.recover(1)
        pair.comm.check()
        here = np.array([[0, 1], [1, 0], [1, -1]], np.int32)
        for layer in (1, 2):
            route = pair.comm.route(pair.tensor(here), pair.tensor(WEIGHTS))
            pair.comm.dispatch_send(pair.tensor(X), route, layer % 2, layer)
            pair.answer()
            assert not any(is_nan(pair.comm.combine_recv(layer % 2).cpu()))
        pair.dispatch()  # for both ranks, one of which is gone
        pair.answer()
        with pytest.raises(m2n.PeerLost, match=r"dispatch_send\(microbatch=0\).*expert rank 1 is lost"):
            pair.comm.combine_recv()
        assert is_nan(pair.comm.combine_recv().cpu()) == [False, True, True]
        gone.close()


@pytest.mark.parametrize("to_do, is_lost", [("die", True), ("answer_and_die", False)])
def test_a_killed_process_is_lost_to_a_launched_wait(to_do: str, is_lost: bool, tmp_path: Path) -> None:
    # On the CPU: it need not be of our kind.
    process = multiprocessing.get_context("spawn").Process(
        target=bodies.expert_main, args=(0, str(tmp_path), SMALL, ONE, to_do)
    )
    process.start()
    with m2n.AttentionComm(0, SMALL, ONE, tmp_path, device="emulated", config=config()) as comm:
        comm.dispatch_send(torch.from_numpy(X), comm.route(torch.from_numpy(IDS), torch.from_numpy(WEIGHTS)))
        process.join()
        y = comm.combine_recv(timeout=SOON_S)
        assert is_nan(y) == [is_lost] * 3  # a complete reply of a dead peer counts
        with pytest.raises(m2n.PeerLost, match="expert rank 0 is lost"):
            for _ in range(500):  # it may die a little after its reply
                comm.check()
                time.sleep(0.01)


@on_devices
def test_a_dispatch_that_gives_up_sends_nothing_and_its_combine_is_nan(device: str, tmp_path: Path) -> None:
    late = dataclasses.replace(config(), timeout_s=0.05)
    with Pair(tmp_path, device, config=late) as pair:
        nothing = torch.empty(0, SMALL.top_k)
        route = pair.comm.route(nothing.int().to(pair.where), nothing.to(pair.where))
        pair.comm.dispatch_send(torch.empty(0, SMALL.hidden, device=pair.where), route)
        assert pair.comm.combine_recv().shape == (0, SMALL.hidden)  # the reply to no rows is not awaited
        pair.dispatch()  # but by the next dispatch
        pair.sync()
        with pytest.raises(m2n.Timeout, match="has not answered the last message on this slot; nothing was sent"):
            pair.comm.check()
        assert all(is_nan(pair.comm.combine_recv().cpu()))
        pair.answer()
        pair.dispatch(layer=1)
        pair.answer(layer=1)
        assert torch.equal(pair.comm.combine_recv(timeout=SOON_S).cpu(), pair.expected())
        pair.comm.check()


@on_devices
@pytest.mark.parametrize("reduce_at, num_replied", [("expert", 4), ("attention", 6)])
def test_what_was_moved_is_counted(device: str, reduce_at: Any, num_replied: int, tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, reduce_at=reduce_at)
    with Pair(tmp_path, device, TWO, shape=shape) as pair:
        pair.dispatch()
        pair.answer()
        pair.comm.combine_recv()
        pair.sync()
        sent, replied = pair.comm.stats(), [comm.stats() for comm in pair.experts]
        assert (sent["messages_sent"], sent["rows_sent"]) == (2, 4)  # the last token goes to both ranks
        assert (sent["messages_received"], sent["rows_received"]) == (2, num_replied)
        assert sum(stats["rows_received"] for stats in replied) == 4
        assert sum(stats["rows_sent"] for stats in replied) == num_replied
        for one, other in (("sent", "received"), ("received", "sent")):
            assert sum(stats[f"bytes_{other}"] for stats in replied) == sent[f"bytes_{one}"]


@on_devices
def test_an_expert_that_is_not_hosted_is_refused_by_name(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO, placement=m2n.Placement([[0], [1], [1], [1]])) as pair:
        pair.dispatch()  # asks rank 1 for expert 1
        assert pair.experts[0].dispatch_recv() is not None
        assert pair.experts[1].dispatch_recv(timeout=0.2) is None
        pair.comm.combine_recv(timeout=0.2)
        pair.sync()
        with pytest.raises(m2n.ProtocolError, match="expert rank 1 does not host expert 1"):
            pair.check_past_a_timeout()


@on_devices
def test_an_idle_rank_is_answered_and_nobody_waits_for_it(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        for layer in range(3):
            pair.dispatch(layer=layer)
            pair.answer(linger_us=1e6)
            pair.comm.combine_recv()
            pair.comm.idle()
            assert pair.experts[0].wait_work(0.02) is None


@on_devices
def test_a_batch_keeps_its_slot_until_it_is_answered(device: str, tmp_path: Path) -> None:
    """Its lists lie at fixed addresses: a late message of the same microbatch waits."""
    with Pair(tmp_path, device) as pair, m2n.AttentionComm(1, **pair.options) as late:
        server = pair.experts[0]
        pair.dispatch(layer=4)
        first = server.dispatch_recv(linger_us=0)
        index = first.row_index_by_expert.clone()
        late.dispatch_send(pair.tensor(X), late.route(pair.tensor(IDS), pair.tensor(WEIGHTS)), layer=4)
        assert server.dispatch_recv(linger_us=0, timeout=0.05) is None
        assert torch.equal(first.row_index_by_expert, index)
        server.combine_send(first, first.gather())
        second = server.dispatch_recv(linger_us=0)
        assert (first.peers, second.peers) == ([0], [1])
        server.combine_send(second, second.gather())
        assert not any(is_nan(late.combine_recv().cpu())) and not any(is_nan(pair.comm.combine_recv().cpu()))
        with pytest.raises(ValueError, match="already called"):
            server.combine_send(second, torch.zeros(6, SMALL.hidden, device=pair.where))


@on_devices
def test_aborting_ends_a_launched_wait(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        pair.dispatch()
        ended = threading.Event()

        def wait() -> None:
            pair.comm.combine_recv(timeout=60)
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        pair.comm.abort()
        thread.join(SOON_S)
        assert ended.is_set()
        with pytest.raises(m2n.SetupError, match="closed"):
            pair.comm.check()


@on_devices
def test_ready_made_splits(device: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device, TWO) as pair:
        ids, weights = pair.tensor(np.array([[0, 1], [2, 3], [3, -1]], np.int64)), pair.tensor(WEIGHTS)
        route = m2n.Route.from_splits([1, 2], ids, weights, shape=SMALL)
        pair.comm.dispatch_send(pair.tensor(X), route)
        assert route.rows_per_rank == [1, 2]
        pair.answer()
        workload = testing.Workload(torch.from_numpy(X), ids.cpu(), weights.cpu())
        assert torch.equal(pair.comm.combine_recv().cpu(), testing.oracle_combine(workload, SMALL, TWO))
        wrong = m2n.Route.from_splits([1, 2], ids[[0, 1, 0]], weights, shape=SMALL)
        pair.comm.dispatch_send(pair.tensor(X), wrong, microbatch=1)  # rank 1 is asked for experts 0 and 1
        assert pair.experts[1].dispatch_recv(timeout=0.2) is None


@on_devices
@pytest.mark.parametrize(
    "ids, weights, words",
    [
        ([[0, 4]], [[0.5, 0.5]], "topk_ids: expert id 4 at token 0 is out of range"),
        ([[0, 2**40]], [[0.5, 0.5]], "is out of range"),
        ([[1, 1]], [[0.5, 0.5]], "comes twice at token 0"),
        ([[1, 2]], [[0.5, float("nan")]], "topk_weights: not finite"),
    ],
)
def test_bad_router_output_is_refused(device: str, ids: Any, weights: Any, words: str, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        with pytest.raises(ValueError, match=words):
            pair.comm.route(torch.tensor(ids).to(pair.where), torch.tensor(weights).to(pair.where))
            pair.sync()
            pair.comm.check()
        pair.comm.check()  # told once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@on_devices
def test_router_outputs_of_any_dtype_and_stride(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with Pair(tmp_path, device) as pair:
        wide = pair.tensor(np.repeat(WEIGHTS, 2, axis=1)).to(dtype)
        ids = pair.tensor(np.asfortranarray(IDS.astype(np.int64)))
        x = torch.full((3, 100), float("nan"), device=pair.where)
        x[:, 20:84] = pair.tensor(X)
        pair.comm.dispatch_send(x[:, 20:84], pair.comm.route(ids, wide[:, ::2]))
        pair.answer()
        out = torch.zeros(3, 80, device=pair.where)
        pair.comm.combine_recv(out=out[:, 8:72])
        assert torch.equal(out[:, 8:72].cpu(), pair.expected()) and not out[:, :8].any() and not out[:, 72:].any()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["object", "handle"])
def test_verbs_go_to_the_stream_that_is_named(kind: str, tmp_path: Path) -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    sends, receives = streams if kind == "object" else [stream.cuda_stream for stream in streams]
    with Pair(tmp_path, "cuda:0") as pair:
        x, ids, weights = pair.tensor(X), pair.tensor(IDS), pair.tensor(WEIGHTS)
        torch.cuda.synchronize()
        # Launched before anything was sent: the default stream would never come to the send.
        pair.comm.dispatch_send(x, pair.comm.route(ids, weights, stream=sends), stream=sends)
        out = torch.zeros(3, SMALL.hidden, device="cuda:0")
        torch.cuda.synchronize()
        pair.comm.combine_recv(out=out, stream=sends)
        assert not streams[0].query()  # it waits
        with torch.cuda.stream(streams[1]):
            batch = pair.experts[0].dispatch_recv(stream=receives)
            y = expert_outputs(batch, range(4))
        pair.experts[0].combine_send(batch, y, stream=receives)
        streams[0].synchronize()
        assert torch.equal(out.cpu(), pair.expected())


@pytest.mark.cuda
def test_cupy_in_cupy_out(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    in_cupy = dataclasses.replace(config(), arrays="cupy")
    options = {"shape": SMALL, "placement": ONE, "store": tmp_path, "config": in_cupy, "device": "cuda:0"}
    with m2n.ExpertComm(0, **options) as server, m2n.AttentionComm(0, **options) as comm:
        comm.dispatch_send(cupy.asarray(X), comm.route(cupy.asarray(IDS), cupy.asarray(WEIGHTS)))
        torch.cuda.synchronize()
        batch = server.dispatch_recv()
        assert isinstance(batch.x, cupy.ndarray) and isinstance(batch.weights, cupy.ndarray)
        rows = batch.gather()
        assert batch.gather("padded").shape[0] == 4
        server.combine_send(batch, rows)
        torch.cuda.synchronize()
        y = comm.combine_recv()
        assert isinstance(y, cupy.ndarray)
        # Experts that change nothing: the weights are 0.5 each.
        assert np.array_equal(cupy.asnumpy(y), X)


@pytest.mark.parametrize(
    "stream, expected",
    [
        (7, 7),
        (np.int64(8), 8),
        (types.SimpleNamespace(cuda_stream=9), 9),
        (types.SimpleNamespace(ptr=10), 10),
        (types.SimpleNamespace(__cuda_stream__=lambda: (0, 11)), 11),
    ],
)
def test_streams_of_several_libraries_are_understood(stream: Any, expected: int) -> None:
    assert arrays.stream_handle(stream, "cuda:0") == expected


def test_what_is_no_stream_is_refused() -> None:
    for wrong in (True, "0", 1.5):
        with pytest.raises(TypeError, match="stream: expected a torch or cupy stream or a handle"):
            arrays.stream_handle(wrong, "cuda:0")
    with pytest.raises(ValueError, match="stream: 'emulated' has none, got 7"):
        arrays.stream_handle(7, "emulated")


@pytest.mark.parametrize("devices", [("cpu", "emulated"), ("emulated", "cpu")])
def test_a_cpu_rank_and_an_emulated_one_speak_the_same_protocol(devices: tuple[str, str], tmp_path: Path) -> None:
    with Pair(tmp_path, devices[1], device=devices[0]) as pair:
        for layer in range(4):
            pair.dispatch(layer % 2, layer)
            pair.answer()
            assert torch.equal(pair.comm.combine_recv(layer % 2), pair.expected())


def test_a_route_of_another_device_is_refused(tmp_path: Path) -> None:
    ids, weights = torch.from_numpy(IDS), torch.from_numpy(WEIGHTS)
    with Pair(tmp_path, "emulated") as pair, Pair(tmp_path, "cpu", name="other") as other:
        for comm, foreign in ((pair.comm, other.comm), (other.comm, pair.comm)):
            route = foreign.route(ids, weights)
            with pytest.raises(ValueError, match="route: it was made for another device"):
                comm.dispatch_send(torch.from_numpy(X), route)
            with pytest.raises(ValueError, match="out: it was made for another device|in flight"):
                other.comm.route(ids, weights, out=pair.comm.route(ids, weights))
