# SPDX-License-Identifier: Apache-2.0
"""The small case of few ranks: the four experts of `bodies.SMALL` on one rank or on two, and three tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import SMALL, small_answer

import m2n

TWO = m2n.Placement.block(4, 2)
IDS = np.array([[0, 1], [2, 3], [0, 3]], np.int32)
WEIGHTS = np.full((3, 2), 0.5, np.float32)
X = np.arange(3 * 64, dtype=np.float32).reshape(3, 64)

context = multiprocessing.get_context("spawn")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """start(main, rank, placement, to_do) starts a process on the store in tmp_path; all are ended afterwards."""
    processes = []

    def begin(main: Any, rank: int, placement: m2n.Placement, to_do: str) -> Any:
        process = context.Process(target=main, args=(rank, str(tmp_path), SMALL, placement, to_do))
        process.start()
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()


def dispatch(comm: m2n.AttentionComm, microbatch: int = 0) -> None:
    comm.dispatch_send(X, comm.route(IDS, WEIGHTS), microbatch=microbatch)


def answer(comm: m2n.ExpertComm) -> None:
    """Answers one batch, which must come."""
    assert small_answer(comm)
