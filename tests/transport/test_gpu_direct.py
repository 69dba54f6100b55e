# SPDX-License-Identifier: Apache-2.0
"""Rows in the memory of a GPU that NICs reach (`Config.gpu_direct`). There is no such NIC here: on `emulated` devices
rows lie in memory of the host, but apart from signals, as on a GPU, and go by puts of shared memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import ONE, SMALL, config_of
from small_case import TWO
from waits import SOON_S

import m2n
from m2n import testing

pytestmark = pytest.mark.ucx
APART, TOGETHER = (dataclasses.replace(config_of(name), arrays="torch") for name in ("gpu-direct", "ucx-put"))


@pytest.mark.parametrize("waits", [False, True], ids=["kernels wait", "streams wait"])
@pytest.mark.parametrize(
    "configs", [(APART, APART), (APART, TOGETHER), (TOGETHER, APART)], ids=["both", "attention", "experts"]
)
def test_rows_apart_from_signals_equal_the_oracle(configs: Any, waits: bool, tmp_path: Path) -> None:
    shape = dataclasses.replace(
        SMALL, hidden=72, dispatch_dtype="bfloat16", combine_dtype="bfloat16", reduce_at="attention"
    )
    of_attention, of_experts = (dataclasses.replace(config, stream_waits=waits) for config in configs)
    options: Any = {"shape": shape, "placement": TWO, "store": tmp_path, "device": "emulated", "max_peers": 3}
    experts = [m2n.ExpertComm(rank, config=of_experts, **options) for rank in range(2)]
    ranks = [m2n.AttentionComm(rank, config=of_attention, **options) for rank in range(2)]
    for layer in range(8):
        kind, microbatch = testing.KINDS[layer % len(testing.KINDS)], layer % shape.microbatches
        workloads = [testing.make_workload(shape, kind, 10 * layer + comm.rank) for comm in ranks]
        for comm, w in zip(ranks, workloads):
            comm.dispatch_send(w.x, comm.route(w.topk_ids, w.topk_weights), microbatch, layer)
        for comm in experts:
            batch = comm.dispatch_recv(layer, microbatch, linger_us=None, attention_ranks=[0, 1], timeout=SOON_S)
            comm.combine_send(batch, testing.expert_outputs(batch, TWO.experts_of(comm.rank)))
        for comm, w in zip(ranks, workloads):
            y = comm.combine_recv(microbatch, timeout=SOON_S)
            assert torch.equal(y, testing.oracle_combine(w, shape, TWO, comm.rank))
            comm.check()
    for comm in (*ranks, *experts):
        comm.close()


@pytest.mark.parametrize("sends", ["attention", "expert"])
def test_a_peer_that_sends_messages_is_refused_in_words(sends: str, tmp_path: Path) -> None:
    """They would have to be copied into rows that a processor cannot reach."""
    by_message = dataclasses.replace(TOGETHER, ucx_way="message", connect_timeout_s=3.0)
    of_attention, of_expert = (by_message, APART) if sends == "attention" else (APART, by_message)
    options: Any = {"shape": SMALL, "placement": ONE, "store": tmp_path, "device": "emulated"}
    with (
        m2n.ExpertComm(0, config=of_expert, **options),
        pytest.raises((ValueError, m2n.SetupError), match="gpu_direct needs puts in both directions.*ucx_way='put'"),
    ):
        m2n.AttentionComm(0, config=dataclasses.replace(of_attention, connect_timeout_s=3.0), **options)


@pytest.mark.parametrize("device, transport", [("cpu", "ucx"), ("emulated", "shm"), ("emulated", "auto")])
def test_it_needs_a_device_and_ucx(device: str, transport: str, tmp_path: Path) -> None:
    config = m2n.Config(transport=transport, gpu_direct=True)
    with pytest.raises(ValueError, match="config.gpu_direct: .*need transport='ucx' and a device, not"):
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, device, config=config)
