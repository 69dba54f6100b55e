# SPDX-License-Identifier: Apache-2.0
"""Ranks whose verbs are launched: on `emulated` on CPU threads, on `cuda:0` as kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
import torch
from bodies import ONE, SMALL
from small_case import IDS, WEIGHTS, X

import m2n
from m2n import testing
from m2n.testing import expert_outputs

on_devices = pytest.mark.parametrize("device", ("emulated", pytest.param("cuda:0", marks=pytest.mark.cuda)))


def config() -> m2n.Config:
    return dataclasses.replace(bodies.NUMPY, arrays="torch")


class Pair:
    """An attention rank and the expert ranks of a placement, on one device, in this thread."""

    def __init__(self, store: Path, on: str, placed: m2n.Placement = ONE, **of_attention: Any) -> None:
        self.where = on if on.startswith("cuda") else "cpu"
        self.options = {"shape": SMALL, "placement": placed, "store": store, "config": config(), "device": on}
        shared = {**self.options, **{key: of_attention[key] for key in ("name", "shape") if key in of_attention}}
        self.experts = [m2n.ExpertComm(i, **shared) for i in range(placed.num_expert_ranks)]
        self.comm = m2n.AttentionComm(0, **{**self.options, **of_attention})

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for comm in (self.comm, *self.experts):
            comm.close()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.where)

    def dispatch(self, microbatch: int = 0, layer: int = 0) -> None:
        route = self.comm.route(self.tensor(IDS), self.tensor(WEIGHTS))
        self.comm.dispatch_send(self.tensor(X), route, microbatch, layer)

    def answer(self, **options: Any) -> None:
        for comm in self.experts:
            batch = comm.dispatch_recv(**options)
            assert batch is not None
            comm.combine_send(batch, expert_outputs(batch, comm.placement.experts_of(comm.rank)))

    def sync(self) -> None:
        """Until everything that was launched has run."""
        if self.where != "cpu":
            torch.cuda.synchronize()

    def check_past_a_timeout(self) -> None:
        """check() until it raises something else: that another rank is late may be told first."""
        for _ in range(2):
            with contextlib.suppress(m2n.Timeout):
                self.comm.check()

    def expected(self) -> torch.Tensor:
        workload = testing.Workload(torch.from_numpy(X), torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
        return testing.oracle_combine(workload, SMALL, self.options["placement"])


def outputs_at_capacity(batch: m2n.Batch, experts: range) -> torch.Tensor:
    """expert_outputs() without a look at the host: what lies behind the last pair is computed too; it means nothing."""
    index, offsets = batch.row_index_by_expert, batch.expert_offsets
    pairs = torch.arange(len(index), device=index.device)
    expert = (torch.searchsorted(offsets[1:], pairs, right=True) + experts[0]).clamp(max=experts[-1])
    scale, bias = 0.5 + 0.25 * (expert % 5), 0.125 * expert
    x = batch.x[index]
    return (x.float() * scale.float()[:, None] + bias.float()[:, None]).to(x.dtype)
