# SPDX-License-Identifier: Apache-2.0
"""The two processes of `m2n-bench growth` at the Python boundary:
python -m m2n.benchmarks.exchange.growth_ranks FOLDER ROLE.

One attention rank on a core of its own, and all expert ranks in one thread on another: so a verb's own time is seen,
not the scheduler's. Idle attention ranks join from the first process and never send. Times in us go to
FOLDER/<idle>.npy: float64 [rounds][3], of dispatch_send, of combine_recv once all replies are here, and of the round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import m2n

_TIMEOUT_S = 20.0


class Case:
    """What both processes know: case.json of the folder."""

    def __init__(self, folder: Path, role: str) -> None:
        about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.n, self.tokens, self.rounds = about["n"], about["tokens"], about["rounds"]
        self.idle_counts = about["idle_counts"]  # ascending
        self.shape = m2n.Shape(
            hidden=about["row_bytes"] // 4, num_experts=self.n, top_k=1, max_tokens=self.tokens,
            dispatch_dtype="float32", combine_dtype="float32",
        )  # fmt: skip
        self.common: dict[str, Any] = {
            "shape": self.shape, "placement": m2n.Placement.block(self.n, self.n), "store": str(folder),
        }  # fmt: skip
        os.sched_setaffinity(0, {about["cores"][role == "expert"]})


def run_attention(case: Case) -> None:
    """Times rounds, each time with more idle ranks beside it."""
    tokens = np.arange(case.tokens)
    ids = (tokens * case.n // case.tokens)[:, None]  # neighbours go to one rank, in one piece
    x = np.ones((case.tokens, case.shape.hidden), np.float32)
    y = np.empty_like(x)
    with ExitStack() as stack:
        comm = stack.enter_context(m2n.AttentionComm(0, **case.common))
        route = comm.route(ids, np.ones((case.tokens, 1), np.float32))
        others: list[m2n.AttentionComm] = []
        for idle in case.idle_counts:
            while len(others) < idle:
                others.append(stack.enter_context(m2n.AttentionComm(1 + len(others), **case.common)))
            times = np.empty((case.rounds, 4))
            for turn in range(case.rounds):
                times[turn, 0] = time.perf_counter_ns()
                comm.dispatch_send(x, route)
                times[turn, 1] = time.perf_counter_ns()
                while not comm.ready(0):
                    pass
                times[turn, 2] = time.perf_counter_ns()
                comm.combine_recv(0, y)
                times[turn, 3] = time.perf_counter_ns()
            began_ns, sent_ns, ready_ns, ended_ns = times.T
            columns = sent_ns - began_ns, ended_ns - ready_ns, ended_ns - began_ns
            np.save(case.folder / f"{idle}.npy", np.stack(columns, axis=1) / 1e3)


def run_experts(case: Case) -> None:
    """Answers every batch, rank after rank."""
    y = np.ones((case.tokens, case.shape.hidden), np.float32)
    with ExitStack() as stack:
        comms = [stack.enter_context(m2n.ExpertComm(rank, **case.common)) for rank in range(case.n)]
        for _ in range(case.rounds * len(case.idle_counts)):
            for comm in comms:
                batch = comm.dispatch_recv(linger_us=0, timeout=_TIMEOUT_S)
                if batch is None:
                    raise TimeoutError("no batch")
                comm.combine_send(batch, y[: batch.num_rows], reduced=True)
        for comm in comms:  # until the other side has read what came
            while any(peer.state == "live" for peer in comm.peers()):
                time.sleep(0.005)


def main(folder: str, role: str) -> None:
    """One process."""
    case = Case(Path(folder), role)
    run_attention(case) if role == "attention" else run_experts(case)


if __name__ == "__main__":
    main(*sys.argv[1:])
