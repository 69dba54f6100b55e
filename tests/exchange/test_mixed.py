# SPDX-License-Identifier: Apache-2.0
"""Ranks on different devices in one comm, and ranks of several processes on one GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from oracle import REPLICAS, SHAPE, all_kinds, to_numpy

import m2n
from m2n import bootstrap, testing
from m2n.ranks import run_ranks

ON_HOST = dataclasses.replace(bodies.NUMPY, transport="shm")
# (of the attention ranks, of the expert ranks)
CPU_AND_LAUNCHES = [("cpu", "emulated"), ("emulated", "cpu")]
CPU_AND_GPU = [("cpu", "cuda:0"), ("cuda:0", "cpu")]


def check(
    shape: m2n.Shape, devices: tuple[str, str], config: m2n.Config, processes: bool = False, **options: Any
) -> None:
    """Every kind of workload between two attention and three expert ranks, compared with the oracle."""
    torch_workloads = all_kinds(shape, 2)
    workloads = [[to_numpy(workload) for workload in layers] for layers in torch_workloads]
    exchange = bodies.exchange_on_gpu if devices[0].startswith("cuda") else bodies.exchange
    expert_config = dataclasses.replace(config, arrays="torch" if devices[1].startswith("cuda") else "numpy")
    results = run_ranks(
        (functools.partial(exchange, workloads=workloads), functools.partial(bodies.answer, attention=2)),
        2, 3, shape=shape, placement=REPLICAS, device=devices, config=expert_config, processes=processes, **options,
    )  # fmt: skip
    for rank, layers in enumerate(torch_workloads):
        for layer, workload in enumerate(layers):
            expected = testing.oracle_combine(workload, shape, REPLICAS, rank).numpy()
            assert np.array_equal(results["attention", rank][layer], expected), f"attention rank {rank}, layer {layer}"


@pytest.mark.sanitize
@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize("devices", CPU_AND_LAUNCHES)
def test_cpu_ranks_and_ranks_that_launch_equal_the_oracle(devices: tuple[str, str], reduce_at: Any) -> None:
    check(dataclasses.replace(SHAPE, reduce_at=reduce_at), devices, ON_HOST)


over_networks = pytest.mark.parametrize("network", ["tcp", pytest.param("ucx", marks=pytest.mark.ucx)])


@over_networks
@pytest.mark.parametrize("devices", [*CPU_AND_LAUNCHES, ("emulated", "emulated")])
def test_the_same_over_a_network(devices: tuple[str, str], network: str) -> None:
    """What launches write into send areas goes out when they ring; what arrives they find in memory of the host."""
    check(SHAPE, devices, bodies.config_of(network))


@pytest.mark.parametrize("devices", CPU_AND_LAUNCHES)
def test_the_same_as_processes(devices: tuple[str, str]) -> None:
    check(SHAPE, devices, ON_HOST, processes=True)


@pytest.mark.parametrize("device, wakes", [("cpu", True), ("emulated", False)])
def test_a_rank_says_whether_it_wakes_its_peers(device: str, wakes: bool, tmp_path: Path) -> None:
    """A CPU rank sleeps in short slices where a peer does not."""
    with m2n.ExpertComm(0, SHAPE, m2n.Placement.block(8, 1), tmp_path, config=ON_HOST, device=device) as comm:
        assert comm._native.offer(0, 1)["wakes"] is wakes


def test_a_cpu_rank_that_has_slept_long_sees_the_signal_of_one_that_wakes_nobody(tmp_path: Path) -> None:
    placement = m2n.Placement.block(8, 1)
    workload = to_numpy(testing.make_workload(SHAPE, testing.KINDS[0], 1))
    with m2n.ExpertComm(0, SHAPE, placement, tmp_path, config=ON_HOST, device="emulated") as expert:
        with m2n.AttentionComm(0, SHAPE, placement, tmp_path, config=ON_HOST) as attention:
            attention.dispatch_send(workload.x, attention.route(workload.topk_ids, workload.topk_weights))
            batch = expert.dispatch_recv()
            assert batch is not None
            answer = threading.Timer(0.2, expert.combine_send, (batch, testing.expert_outputs(batch, range(8))))
            answer.start()
            attention.combine_recv()
            answer.join()


@pytest.mark.sanitize
@pytest.mark.parametrize("devices", [*CPU_AND_LAUNCHES, ("emulated", "emulated")])
def test_messages_tell_the_version_of_the_placement(devices: tuple[str, str], tmp_path: Path) -> None:
    """With and without rows, and before anybody has received them."""
    one, two, three = (m2n.Placement.block(8, 1, version=version) for version in (0, 5, 9))
    workload = to_numpy(testing.make_workload(SHAPE, testing.KINDS[0], 1))
    options = {"store": tmp_path, "config": ON_HOST}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(m2n.ExpertComm(0, SHAPE, one, device=devices[1], **options))
        comms = [
            m2n.AttentionComm(rank, SHAPE, p, device=devices[0], **options) for rank, p in enumerate((one, two, three))
        ]
        for comm in (*comms, server):
            stack.enter_context(comm)
            if comm.device != "cpu":
                with pytest.raises(ValueError, match="placement: that of a comm on 'emulated' is fixed"):
                    comm.set_placement(three)
        assert all(server.wait_peer(comm.rank, 5) for comm in comms)
        assert server.placement_versions() == {0: 0, 1: 0, 2: 0}
        comms[1].idle()
        comms[2].dispatch_send(workload.x, comms[2].route(workload.topk_ids, workload.topk_weights), layer=4)
        assert server.placement_versions() == {0: 0, 1: 5, 2: 9}
        with pytest.raises(m2n.Timeout, match="attention rank 0 has shown placement version 0 so far") as caught:
            server.wait_placement(5, timeout=0.05)
        assert caught.value.peer == 0
        comms[0].close()
        server.wait_placement(5, timeout=5)  # it sees the goodbye
        batch = server.dispatch_recv(timeout=5)
        assert batch is not None and batch.peers == [2] and batch.experts == list(range(8))
        server.combine_send(batch, testing.expert_outputs(batch, batch.experts))
        comms[2].combine_recv(timeout=5)
        with pytest.raises(m2n.Timeout, match="attention rank 1 has shown placement version 5 so far"):
            server.wait_placement(9, timeout=0)


def test_transports_that_do_not_fit_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="config.transport: device 'cpu' needs 'auto', 'shm', 'tcp' or 'ucx', got 'cuda'"
    ):
        config = dataclasses.replace(ON_HOST, transport="cuda")
        m2n.ExpertComm(0, SHAPE, m2n.Placement.block(8, 1), tmp_path, config=config)
    gpu = bootstrap.Identity("default", "default", "expert", 0, SHAPE, "cuda")
    offer = {
        "process": 1,
        "device": "",
        "wakes": False,
        "objects": [(-1, 1), (-1, 2), (-1, 3)],
        "address": b"",
        "link": 1,
    }
    cpu = bootstrap.Identity("default", "default", "attention", 0, SHAPE, "shm")
    with pytest.raises(
        m2n.SetupError, match=r"'cuda' for this link, attention rank 0 'shm'.*Config\(transport='shm'\)"
    ):
        bootstrap.check_introduction(cpu, bootstrap.introduction(gpu, offer, "cuda"), 0, "shm")


@pytest.mark.cuda
@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("devices", CPU_AND_GPU)
def test_cpu_and_gpu_ranks_equal_the_oracle(devices: tuple[str, str], processes: bool) -> None:
    check(SHAPE, devices, ON_HOST, processes)


@pytest.mark.cuda
@over_networks
@pytest.mark.parametrize("devices", [*CPU_AND_GPU, ("cuda:0", "cuda:0")])
def test_gpu_ranks_over_a_network_equal_the_oracle(devices: tuple[str, str], network: str) -> None:
    check(SHAPE, devices, bodies.config_of(network))


@pytest.mark.cuda
@pytest.mark.ucx
def test_rows_in_the_memory_of_a_gpu_equal_the_oracle() -> None:
    """By puts that UCX makes inside this host: a NIC of its own would be needed for more."""
    config = dataclasses.replace(
        bodies.config_of("gpu-direct"), ucx_variables={"TLS": "cuda_ipc,cuda_copy,posix,cma,self"}
    )
    try:
        check(SHAPE, ("cuda:0", "cuda:0"), config, processes=True)
    except (ValueError, m2n.SetupError) as error:
        if "needs a UCX that knows" not in str(error) and "no NIC" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.cuda
def test_processes_that_share_a_gpu_equal_the_oracle() -> None:
    check(SHAPE, ("cuda:0", "cuda:0"), dataclasses.replace(bodies.NUMPY, transport="auto"), processes=True)


@pytest.mark.cuda
def test_a_killed_process_on_a_gpu_is_peer_lost_and_the_context_goes_on(tmp_path: Path) -> None:
    import multiprocessing

    import torch

    config = dataclasses.replace(bodies.NUMPY, arrays="torch")
    placement = m2n.Placement.block(8, 1)
    workload = testing.make_workload(SHAPE, testing.KINDS[0], 1)
    context = multiprocessing.get_context("spawn")
    expert = context.Process(target=bodies.gpu_expert_that_dies, args=(str(tmp_path), SHAPE, placement), daemon=True)
    expert.start()
    with m2n.AttentionComm(0, SHAPE, placement, tmp_path, config=config, device="cuda:0") as comm:
        ids, weights = workload.topk_ids.cuda(), workload.topk_weights.cuda()
        comm.dispatch_send(workload.x.cuda(), comm.route(ids, weights))
        y = comm.combine_recv()  # waits in a kernel while the process dies
        torch.cuda.synchronize()
        expert.join(timeout=30)
        assert expert.exitcode == -9
        with pytest.raises(m2n.PeerLost):
            comm.check()
        assert y.isnan().all(), "rows of a lost rank"
    check(SHAPE, ("cuda:0", "cuda:0"), dataclasses.replace(bodies.NUMPY, transport="auto"))
