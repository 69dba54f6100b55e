# SPDX-License-Identifier: Apache-2.0
"""Contenders at the Python boundary: the same job as native/contender.h. That of m2n needs numpy only."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

import m2n

from .job import Job, encode, read_lines
from .peers import TIMEOUT_S, Gloo, GlooAllToAll, Mpi4py


class M2n:
    """The public verbs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        shape = m2n.Shape(
            hidden=job.hidden, num_experts=job.experts, top_k=job.top_k, max_tokens=job.tokens,
            dispatch_dtype=job.dtype, combine_dtype=job.dtype, reduce_at=job.values["reduce_at"],
        )  # fmt: skip
        placement = m2n.Placement.block(job.experts, job.n)
        transport = job.values["transport"].partition(";")[0]
        variables = {"TLS": "tcp,self"} if transport == "ucx" else {}
        config = m2n.Config(
            timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S, arrays="numpy",
            transport=transport, ucx_variables=variables, insecure=bool(variables),
        )  # fmt: skip
        options: dict[str, Any] = {"shape": shape, "placement": placement, "store": str(job.folder / "store")}
        x = encode(np.zeros((job.tokens, job.x_stride_rows, job.hidden)), job.dtype)
        self._attention_ranks = list(range(job.m))
        if job.is_attention:
            self._x, self._y = x[:, 0], np.zeros((job.tokens, job.hidden), x.dtype)
            self.x_bytes, self.x_bits, self.y_bits = x.view(np.uint8), _bits(self._x), _bits(self._y)
            self._attention = m2n.AttentionComm(job.rank, **options, max_peers=job.n, config=config)
            ids = job.topk_ids[job.rank]
            self._route = self._attention.route(ids, np.full(ids.shape, 0.5, np.float32))
        else:
            self._expert = m2n.ExpertComm(job.rank, **options, max_peers=job.m, config=config)
            for rank in range(job.m):
                self._expert.wait_peer(rank)
        self._runs: list[slice] = []  # of the window, where rows land

    def dispatch_send(self) -> None:
        """Of x."""
        self._attention.dispatch_send(self._x, self._route)

    def combine_recv(self) -> None:
        """Into y."""
        self._attention.combine_recv(out=self._y)

    def dispatch_recv(self) -> None:
        """From all attention ranks."""
        self._batch = self._expert.dispatch_recv(linger_us=None, attention_ranks=self._attention_ranks)

    def read_rows(self) -> None:
        """Where they landed: the same places in every exchange."""
        x = self._batch.x
        for run in self._runs:
            read_lines(x[run])

    def echo(self) -> None:
        """y of the expert rank: what came."""
        index = self._batch.row_index_by_expert
        rows = np.unique(index)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            self._runs.append(slice(run[0], run[-1] + 1) if len(run) else slice(0, 0))
        self._y = self._batch.x[rows if self.job.is_reduced else index]

    def combine_send(self) -> None:
        """Of y."""
        self._expert.combine_send(self._batch, self._y, reduced=self.job.is_reduced)

    def settle(self) -> None:
        """Nothing is pending after an exchange."""

    def close(self) -> None:
        """Leaves."""
        (self._attention if self.job.is_attention else self._expert).close()


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32 if array.itemsize == 4 else np.uint16)


_CLASSES: dict[str, Any] = {"m2n": M2n, "gloo": Gloo, "gloo-a2a": GlooAllToAll, "mpi4py": Mpi4py}
PYTHON_CONTENDERS = (*_CLASSES, "ucxx", "nccl", "nccl-put")
_NO_GPU = "needs GPUs: `make gpu` has it beside m2n there"


def why_not(name: str) -> str:
    """Why a contender cannot run here, in words; "" when it can."""
    if name == "ucxx":
        from . import ucxx as ucxx_contender

        return ucxx_contender.why_not()
    needs = {"gloo": ("torch",), "gloo-a2a": ("torch",), "mpi4py": ("mpi4py", "torch")}.get(name, ())
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)}"
    return _NO_GPU if name.startswith("nccl") else ""


def make(name: str, job: Job) -> Any:
    """The contender of this name, linked with its peers."""
    if name == "ucxx":
        from .ucxx import Ucxx

        return Ucxx(job)
    return _CLASSES[name](job)
