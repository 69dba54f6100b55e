# SPDX-License-Identifier: Apache-2.0
"""One process of a run at the Python boundary:
`python -m m2n.benchmarks.contenders.python_ranks FOLDER PROCESS CONTENDER`.

The counterpart of native/ranks.cc, with the same folder, board, boundary of time and sample files: time.monotonic_ns()
(CLOCK_MONOTONIC) is read before the verb that sends, and when the receiver has read one byte of every line of the rows
(dispatch), or has their sum in y (combine). With m2n this needs numpy only.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from .job import Job, encode, read_job
from .python import make

_LINE_WORDS = 16  # int64 words of 128 bytes
_DEADLINE_S = 20.0


class Board:
    """The words all processes see; as class Board in native/job.h."""

    def __init__(self, job: Job) -> None:
        num_lines = 2 + 2 * (job.m + job.n)
        with open(job.folder / "board", "a+b") as file:
            file.truncate(num_lines * _LINE_WORDS * 8)
        self._lines = np.memmap(job.folder / "board", np.int64, "r+", shape=(num_lines, _LINE_WORDS))[:, 0]
        self._arrived = self._lines[2 : 2 + job.m + job.n]
        self.starts = self._lines[2 + job.m + job.n :]
        self._process, self._meeting, self._yields = job.process, 0, not job.values["cores"]

    def meet(self) -> None:
        """Everybody gets here before anybody goes on."""
        self._meeting += 1
        self._arrived[self._process] = self._meeting
        until = time.monotonic() + _DEADLINE_S
        while int(self._arrived.min()) < self._meeting:
            if self._lines[1]:
                raise RuntimeError("another process has failed")
            if time.monotonic() > until:
                raise RuntimeError("nothing has arrived for too long")
            if self._yields:
                os.sched_yield()

    def stamp(self, now_ns: int) -> None:
        """When this process began to send."""
        self.starts[self._process] = now_ns

    def fail(self) -> None:
        """Tells the others."""
        self._lines[1] = 1

    @property
    def last_round(self) -> int:
        """Set by process 0 before it comes to a meeting."""
        return int(self._lines[0])

    @last_round.setter
    def last_round(self, value: int) -> None:
        self._lines[0] = value


class Rank:
    """Runs the exchanges of one contender and keeps the samples."""

    def __init__(self, job: Job, name: str) -> None:
        if job.values["cores"]:
            os.sched_setaffinity(0, {int(job.values["cores"].split()[job.process])})
        self.job, self.name, self.board = job, name, Board(job)
        self.contender = make(name, job)
        self._senders = [process for process, *link in job.links if len(job.rows_between(*link))]
        self.samples: dict[str, list[float]] = (
            {"combine": [], "roundtrip": []} if job.is_attention else {"dispatch": []}
        )

    def run(self) -> None:
        """Proves that rows come through, then times exchanges until the time is over."""
        contender, board, job = self.contender, self.board, self.job
        contender.settle()
        self._prove()
        ends = time.monotonic() + float(job.values["seconds"])
        board.last_round = int(job.values["max_rounds"]) - 1
        turn = 0
        while True:
            if job.process == 0 and turn > 1 and time.monotonic() > ends:
                board.last_round = turn - 1
            if job.is_attention:
                contender.x_bytes[:] = turn % 64  # fresh rows
            board.meet()
            if turn > board.last_round:
                break
            self._attention() if job.is_attention else self._expert()
            contender.settle()
            turn += 1
        for direction, values in self.samples.items():
            np.asarray(values).tofile(job.folder / f"{self.name}.{direction}.{job.process}")
        contender.close()

    def _attention(self) -> None:
        began_ns = time.monotonic_ns()
        self.board.stamp(began_ns)
        self.contender.dispatch_send()
        self.contender.combine_recv()
        ended_ns = time.monotonic_ns()
        self.samples["roundtrip"].append((ended_ns - began_ns) / 1e3)
        self.samples["combine"].append((ended_ns - int(self.board.starts[self._senders].min())) / 1e3)

    def _expert(self) -> None:
        self.contender.dispatch_recv()
        self.contender.read_rows()
        read_ns = time.monotonic_ns()
        self.board.stamp(read_ns)
        self.contender.combine_send()
        # Only now: the round trip must not pay for it. The stamps stay until the next meeting.
        self.samples["dispatch"].append((read_ns - int(self.board.starts[self._senders].min())) / 1e3)

    def _prove(self) -> None:
        job, contender = self.job, self.contender
        values = np.arange(job.tokens) % 13 + 1.0
        if job.is_attention:
            contender.x_bits[:] = encode(values, job.dtype).view(contender.x_bits.dtype)[:, None]
        self.board.meet()
        if not job.is_attention:
            contender.dispatch_recv()
            contender.echo()
            contender.combine_send()
        else:
            contender.dispatch_send()
            contender.combine_recv()
            pairs = job.rank_of_pair(job.rank)
            ranks = [(pairs == rank).any(-1) for rank in range(job.n)]
            sums = values * (np.sum(ranks, 0) if job.is_reduced else 0.5 * (pairs >= 0).sum(-1))
            expected = encode(sums, job.dtype).view(contender.y_bits.dtype)
            if not (contender.y_bits == expected[:, None]).all():
                raise RuntimeError(f"{self.name}: rows came back wrong")
        contender.settle()


def main(folder: str, process: str, name: str) -> int:
    """Exit status 1 when this process or another one failed."""
    for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if process == "mpi" and variable in os.environ:
            process = os.environ[variable]
    job = read_job(folder, int(process))
    try:
        Rank(job, name).run()
    except Exception as error:
        print(f"process {process}: {type(error).__name__}: {error}", file=sys.stderr)
        Board(job).fail()
        return 1
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # past the threads of libraries, which may wait for peers that are gone
