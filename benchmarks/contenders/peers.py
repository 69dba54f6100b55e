# SPDX-License-Identifier: Apache-2.0
"""Contenders by libraries that Python programs use.

They gather and sum with torch, as a program in torch would, and get their receives posted ahead and all row counts for
nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .job import Job, read_lines

TIMEOUT_S = 20.0


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
        timeout=timedelta(seconds=3 * TIMEOUT_S),
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
