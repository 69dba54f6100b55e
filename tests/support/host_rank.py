# SPDX-License-Identifier: Apache-2.0
"""One rank of the two-host tier, as a program: exchanges that equal the oracle.

Usage: host_rank.py ROLE RANK NUM_ATTENTION NUM_EXPERT STORE [SECONDS]. It prints a line for what happens.
"""

from __future__ import annotations

import os
import sys
import time

import m2n
from m2n import testing

SHAPE = m2n.Shape(hidden=512, num_experts=8, top_k=3, max_tokens=64, microbatches=2)
HEARTBEAT_S = float(os.environ.get("TEST_HEARTBEAT_S", "1"))
DEVICE = os.environ.get("TEST_DEVICE", "cpu")


def say(*words: object) -> None:
    print(*words, flush=True)


def attend(comm: m2n.AttentionComm, seconds: float) -> None:
    """All kinds of workloads again and again, on all microbatches; each result must be the oracle's."""
    import torch

    torch.set_num_threads(1)
    kinds, num_right, began = list(testing.KINDS), 0, time.monotonic()
    while num_right < len(kinds) or time.monotonic() - began < seconds:
        given = []
        for microbatch in range(SHAPE.microbatches):
            number = num_right + microbatch
            workload = testing.make_workload(SHAPE, kinds[number % len(kinds)], 1000 * comm.rank + number)
            given.append(workload)
            comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights), microbatch, number % 5)
        for microbatch, workload in enumerate(given):
            expected = testing.oracle_combine(workload, SHAPE, comm.placement, comm.rank)
            assert torch.equal(comm.combine_recv(microbatch), expected), f"{workload.kind} differs from the oracle"
            num_right += 1
        if num_right % 100 < SHAPE.microbatches:
            say("right", num_right)
    say("right", num_right)


def main() -> int:
    role, rank, num_attention, num_expert, store = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    seconds = float(sys.argv[6]) if len(sys.argv) > 6 else 0.0
    placement = m2n.Placement.block(SHAPE.num_experts, num_expert)
    # On numpy a process starts in a fraction of the time; launched verbs take torch's tensors.
    arrays = "numpy" if role == "expert" and DEVICE == "cpu" else "torch"
    config = m2n.Config(arrays=arrays, timeout_s=60, connect_timeout_s=60, heartbeat_s=HEARTBEAT_S)
    make = m2n.AttentionComm if role == "attention" else m2n.ExpertComm
    try:
        with make(rank, SHAPE, placement, store, device=DEVICE, max_peers=16, config=config) as comm:
            say("joined", round(time.time(), 3))
            if role == "attention":
                attend(comm, seconds)
            else:
                serve(comm, num_attention)
    except m2n.Error as error:
        say(type(error).__name__, round(time.time(), 3), error)
        return 1
    say("done")
    return 0


def serve(comm: m2n.ExpertComm, num_attention: int) -> None:
    left: set[int] = set()
    while len(left) < num_attention:
        try:
            batch = comm.dispatch_recv(timeout=0.2)
        except m2n.PeerLost as lost:
            assert lost.peer is not None
            say("PeerLost", round(time.time(), 3), lost)
            comm.recover(lost.peer)
            continue
        if batch is not None:
            comm.combine_send(batch, testing.expert_outputs(batch, comm.placement.experts_of(comm.rank)))
        left = {peer.rank for peer in comm.peers() if peer.state == "left"}
    offsets = comm.clock_offsets()
    say("clocks", {rank: round(ahead_s, 4) for rank, (ahead_s, _) in offsets.items()})


if __name__ == "__main__":
    sys.exit(main())
