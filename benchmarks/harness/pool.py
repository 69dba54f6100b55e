# SPDX-License-Identifier: Apache-2.0
"""Worker processes that stay: each runs functions one after another, pinned to the cores it is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from m2n.reference_model.console.children import python_command

from .hosts import Place

# What a job may take; the ranks in it have deadlines of their own.
_JOB_TIMEOUT_S = 120.0


class WorkerFailed(RuntimeError):
    """A job raised, or its process died; the text is what it said."""


def _worker_main(connection: Connection) -> None:
    import torch

    kept: dict[Any, Any] = {}  # what jobs leave for later jobs: loaded weights
    while True:
        try:
            fn, arguments, cores, num_threads = connection.recv()
        except EOFError:
            return
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(num_threads)
        try:
            connection.send((True, fn(kept, *arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Job:
    """A function for one worker: fn(kept, *arguments), `kept` being a dictionary that lives as long as the process."""

    def __init__(
        self, worker: int, cores: Sequence[int], fn: Callable[..., Any], *arguments: Any, num_threads: int = 1
    ) -> None:
        self.worker, self.message = worker, (fn, arguments, list(cores), num_threads)


class Pool:
    """Processes that are started afresh with the pool and end with it.

    places: where each worker runs, if not here.
    """

    def __init__(self, num_workers: int, places: Sequence[Place] = ()) -> None:
        self._workers = []
        for prefix, env in places or [Place((), {})] * num_workers:
            ours, theirs = Pipe()
            process = subprocess.Popen(
                [*prefix, *python_command(__name__, theirs.fileno())],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip
            theirs.close()
            self._workers.append((process, ours))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process, connection in self._workers:
            connection.close()
            _wait(process)
            process.kill()
            process.wait()

    def run(self, *jobs: Job) -> list[Any]:
        """Run these jobs at once, each on a worker of its own, and return what they return.

        Raises:
            WorkerFailed: one of them did.
        """
        for job in jobs:
            self._workers[job.worker][1].send(job.message)
        results = []
        for job in jobs:
            process, connection = self._workers[job.worker]
            try:
                if not connection.poll(_JOB_TIMEOUT_S):
                    raise WorkerFailed(f"worker {job.worker} did not end its job within {_JOB_TIMEOUT_S:.0f} s")
                is_fine, result = connection.recv()
            except (EOFError, ConnectionResetError):
                _wait(process)
                raise WorkerFailed(f"worker {job.worker} died with exit code {process.returncode}") from None
            if not is_fine:
                raise WorkerFailed(result)
            results.append(result)
        return results


def _wait(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)


if __name__ == "__main__":
    _worker_main(Connection(int(sys.argv[1])))
