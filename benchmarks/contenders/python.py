# SPDX-License-Identifier: Apache-2.0
"""Contenders at the Python boundary: the same job as native/contender.h, by libraries that Python programs use.

m2n needs numpy only. The others gather and sum with torch, as a program in torch would, and get their receives posted
ahead and all row counts for nothing.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

import m2n

from .python_ranks import Job, encode, read_lines

_TIMEOUT_S = 20.0


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
            timeout_s=_TIMEOUT_S, connect_timeout_s=_TIMEOUT_S, arrays="numpy",
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


class Peer:
    """Buffers, gathering and summing for the others; a subclass moves `sent` to `received`, peer by peer."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self.job, self.torch = job, torch
        self.dtype = getattr(torch, job.dtype)
        self.processes = [process for process, *_ in job.links]
        rows = [job.rows_between(*link) for _, *link in job.links]
        replies = [job.replies_between(*link) for _, *link in job.links]
        self.rows = self._parts([len(part) for part in rows])
        self.replies = self._parts([len(part) for part in replies])
        if not job.is_attention:
            return
        x, self.y = self._zeros(job.tokens * job.x_stride_rows), self._zeros(job.tokens)
        bits = torch.int32 if x.element_size() == 4 else torch.int16
        self.x = x[:: job.x_stride_rows]
        self.x_bytes, self.x_bits, self.y_bits = (
            x.view(torch.uint8).numpy(), x.view(bits).numpy()[:: job.x_stride_rows], self.y.view(bits).numpy()
        )  # fmt: skip
        self._tokens = [torch.from_numpy(part) for part in rows]
        self._token_of_reply = torch.from_numpy(np.concatenate(replies))
        # Where every token has one reply row, y is a permutation of them.
        is_permutation = sorted(self._token_of_reply.tolist()) == list(range(job.tokens)) and job.is_reduced
        self._reply_of_token = torch.argsort(self._token_of_reply) if is_permutation else None

    def _zeros(self, num_rows: int) -> Any:
        return self.torch.zeros(num_rows, self.job.hidden, dtype=self.dtype)

    def _parts(self, counts: list[int]) -> list[Any]:
        return list(self._zeros(sum(counts)).split(counts))

    def gather(self) -> None:
        """Rows of x by destination."""
        for part, tokens in zip(self.rows, self._tokens):
            self.torch.index_select(self.x, 0, tokens, out=part)

    def sum(self) -> None:
        """y of the replies."""
        replies = _whole(self.replies)
        if self._reply_of_token is not None:
            self.torch.index_select(replies, 0, self._reply_of_token, out=self.y)
            return
        self.y.zero_().index_add_(0, self._token_of_reply, replies if self.job.is_reduced else replies * 0.5)

    def read_rows(self) -> None:
        """All that has arrived."""
        for part in self.rows:
            read_lines(part.view(self.torch.uint8).numpy())

    def echo(self) -> None:
        """The reply rows: what came, for each pair where pairs are answered."""
        for peer, (rows, replies) in enumerate(zip(self.rows, self.replies)):
            tokens = self.job.rows_between(peer, self.job.rank)
            place = np.searchsorted(tokens, self.job.replies_between(peer, self.job.rank))
            replies.copy_(rows[self.torch.from_numpy(place)])

    def close(self) -> None:
        """Leaves."""


def _whole(parts: list[Any]) -> Any:
    """The tensor that parts were split from."""
    return (
        parts[0].new_empty(0).set_(parts[0].untyped_storage(), 0, (sum(len(part) for part in parts), parts[0].shape[1]))
    )


class Gloo(Peer):
    """torch.distributed, grouped: batch_isend_irecv."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.dist = _init_gloo(job)
        self._receiving: list[Any] = []
        self._sending: list[Any] = []

    def _start(self, verb: Any, parts: list[Any]) -> list[Any]:
        pairs = zip(parts, self.processes)
        operations = [self.dist.P2POp(verb, part, process) for part, process in pairs if len(part)]
        return self.dist.batch_isend_irecv(operations) if operations else []

    def dispatch_send(self) -> None:
        """Gathers and sends."""
        self.gather()
        self._sending = self._start(self.dist.isend, self.rows)

    def combine_recv(self) -> None:
        """Waits and sums."""
        self._wait()
        self.sum()

    def dispatch_recv(self) -> None:
        """Waits."""
        self._wait()

    def combine_send(self) -> None:
        """The replies lie in order already."""
        self._sending = self._start(self.dist.isend, self.replies)

    def _wait(self) -> None:
        for work in self._receiving:
            work.wait()

    def settle(self) -> None:
        """Posts the next receives."""
        for work in self._sending:
            work.wait()
        self._receiving = self._start(self.dist.irecv, self.replies if self.job.is_attention else self.rows)


class GlooAllToAll(Peer):
    """torch.distributed over all ranks: all_to_all_single, once each way."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.dist = _init_gloo(job)
        self._nothing = self._zeros(0)

    def _exchange(self, sent: list[Any] | None, received: list[Any] | None) -> None:
        splits = []
        for parts in (received, sent):
            counts = [0] * (self.job.m + self.job.n)
            for process, part in zip(self.processes, parts or ()):
                counts[process] = len(part)
            splits.append(counts)
        whole = [self._nothing if parts is None else _whole(parts) for parts in (received, sent)]
        self.dist.all_to_all_single(*whole, *splits)

    def dispatch_send(self) -> None:
        """Gathers and sends."""
        self.gather()
        self._exchange(self.rows, None)

    def combine_recv(self) -> None:
        """Waits and sums."""
        self._exchange(None, self.replies)
        self.sum()

    def dispatch_recv(self) -> None:
        """Waits."""
        self._exchange(None, self.rows)

    def combine_send(self) -> None:
        """The replies lie in order already."""
        self._exchange(self.replies, None)

    def settle(self) -> None:
        """Nothing is pending after an exchange."""


def _init_gloo(job: Job) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{job.folder}/gloo", rank=job.process, world_size=job.m + job.n,
        timeout=timedelta(seconds=3 * _TIMEOUT_S),
    )  # fmt: skip
    return dist


class Mpi4py(Peer):
    """MPI's nonblocking calls on buffers."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from mpi4py import MPI

        self._mpi = MPI
        if MPI.COMM_WORLD.rank != job.process:
            raise RuntimeError(f"mpirun started rank {MPI.COMM_WORLD.rank} as process {job.process}")
        self._buffers = {
            id(parts): [part.view(self.torch.uint8).numpy() for part in parts] for parts in (self.rows, self.replies)
        }
        self._receiving: list[Any] = []
        self._sending: list[Any] = []

    def _start(self, verb: Any, parts: list[Any]) -> list[Any]:
        return [
            verb([buffer, self._mpi.BYTE], process) for buffer, process in zip(self._buffers[id(parts)], self.processes)
        ]

    def dispatch_send(self) -> None:
        """Gathers and sends."""
        self.gather()
        self._sending = self._start(self._mpi.COMM_WORLD.Isend, self.rows)

    def combine_recv(self) -> None:
        """Waits and sums."""
        self._mpi.Request.Waitall(self._receiving + self._sending)
        self.sum()

    def dispatch_recv(self) -> None:
        """Waits."""
        self._mpi.Request.Waitall(self._receiving)

    def combine_send(self) -> None:
        """The replies lie in order already."""
        self._mpi.Request.Waitall(self._start(self._mpi.COMM_WORLD.Isend, self.replies))

    def settle(self) -> None:
        """Posts the next receives."""
        self._receiving = self._start(self._mpi.COMM_WORLD.Irecv, self.replies if self.job.is_attention else self.rows)

    def close(self) -> None:
        """Takes back the receives that are posted, and leaves."""
        for request in self._receiving:
            request.Cancel()
            request.Wait()
        self._mpi.Finalize()


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
