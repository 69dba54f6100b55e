# SPDX-License-Identifier: Apache-2.0
"""Ranks as they run in production: a process each, that meet in a store. In two terminals, or one after the other:

    python examples/ranks.py expert    /tmp/m2n-store &
    python examples/ranks.py attention /tmp/m2n-store

Two layers of three tokens go to the experts and back. The expert rank ends when the attention rank has left. With
tcp://HOST:PORT for a store, and M2N_JOB_KEY set, the two may run on two hosts.
"""

from __future__ import annotations

import sys

import numpy as np

import m2n

SHAPE = m2n.Shape(hidden=8, num_experts=4, top_k=2, max_tokens=16, dispatch_dtype="float32", combine_dtype="float32")
PLACEMENT = m2n.Placement.block(SHAPE.num_experts, 1)  # one expert rank, which hosts them all
NUM_LAYERS = 2


def attention(store: str) -> None:
    topk_ids = np.array([[0, 1], [2, 0], [3, 2]])
    topk_weights = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], np.float32)
    with m2n.AttentionComm(0, SHAPE, PLACEMENT, store) as comm:
        hidden = np.ones((3, SHAPE.hidden), np.float32)
        for layer in range(NUM_LAYERS):
            comm.dispatch_send(hidden, comm.route(topk_ids, topk_weights), layer=layer)
            hidden = comm.combine_recv()  # raises PeerLost where an expert rank died, Timeout where none answers
            print(f"layer {layer}: {hidden[:, 0]}")


def expert(store: str) -> None:
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, store) as comm:
        comm.wait_peer(0, timeout=60)
        while any(peer.state == "live" for peer in comm.peers()):
            batch = comm.dispatch_recv(timeout=0.5)  # raises PeerLost where an attention rank died
            if batch is None:  # idle is no error
                continue
            rows = batch.gather()  # the rows of expert 0, then those of expert 1, and so on
            for i, expert_id in enumerate(batch.experts):  # expert e multiplies by e + 1, in place of a real one
                rows[batch.expert_offsets[i] : batch.expert_offsets[i + 1]] *= expert_id + 1
            comm.combine_send(batch, rows)


if __name__ == "__main__":
    role, store = sys.argv[1:]
    {"attention": attention, "expert": expert}[role](store)
