# SPDX-License-Identifier: Apache-2.0
"""All ranks of an exchange in one thread on one device, every send before the receive that takes it: no launch ever
waits for a later one, so that a tool which runs kernels one at a time can watch.

Usage: python tests/support/virtual_ranks.py cuda:0 [ROUNDS]. Every result is compared with the oracle.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile

import torch

import m2n
from m2n import testing

CONFIG = m2n.Config(arrays="torch", timeout_s=20.0, connect_timeout_s=20.0)


def run(
    device: str,
    shape: m2n.Shape,
    placement: m2n.Placement,
    num_attention: int,
    num_layers: int,
    config: m2n.Config = CONFIG,
) -> int:
    """Layers through all microbatches; the number of results that were right. AssertionError for a wrong one."""
    where = "cpu" if device == "emulated" else device
    num_right = 0
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(prefix="m2n-"))
        options = {"shape": shape, "placement": placement, "store": store, "device": device, "config": config}
        experts = [
            stack.enter_context(m2n.ExpertComm(rank, max_peers=num_attention, **options))
            for rank in range(placement.num_expert_ranks)
        ]
        attention = [stack.enter_context(m2n.AttentionComm(rank, **options)) for rank in range(num_attention)]
        for comm in experts:
            assert all(comm.wait_peer(rank) for rank in range(num_attention))
        for layer in range(num_layers):
            microbatch = layer % shape.microbatches
            kind = testing.KINDS[layer % len(testing.KINDS)]
            workloads = [testing.make_workload(shape, kind, 100 * layer + rank) for rank in range(num_attention)]
            for comm, w in zip(attention, workloads):
                route = comm.route(w.topk_ids.to(where), w.topk_weights.to(where))
                comm.dispatch_send(w.x.to(where), route, microbatch, layer)
            if where != "cpu":
                torch.cuda.synchronize()
            for comm in experts:
                batch = comm.dispatch_recv(layer, microbatch, linger_us=None, attention_ranks=range(num_attention))
                comm.combine_send(batch, testing.expert_outputs(batch, placement.experts_of(comm.rank)))
            if where != "cpu":
                torch.cuda.synchronize()
            results = [comm.combine_recv(microbatch).cpu() for comm in attention]
            for rank, (comm, w, y) in enumerate(zip(attention, workloads, results)):
                comm.check()
                expected = testing.oracle_combine(w, shape, placement, rank)
                assert torch.equal(y, expected), f"attention rank {rank}, layer {layer}: differs from the oracle"
                num_right += 1
    return num_right


def main(device: str, rounds: int) -> None:
    num_right = 0
    for dtype, reply_dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float8_e4m3fn", "bfloat16")):
        for reduce_at in ("expert", "attention"):
            shape = m2n.Shape(
                hidden=72, num_experts=8, top_k=3, max_tokens=17, microbatches=2,
                dispatch_dtype=dtype, combine_dtype=reply_dtype, reduce_at=reduce_at,
            )  # fmt: skip
            num_right += run(device, shape, m2n.Placement.block(8, 3), 2, rounds * len(testing.KINDS))
            print(f"{dtype}, sums at {reduce_at}: {num_right} results so far", flush=True)
    print(f"virtual ranks on {device}: {num_right} results equal the oracle bit for bit")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
