# SPDX-License-Identifier: Apache-2.0
"""The contender `ucxx`: UCX from Python, as asyncio programs use it. `ucxx`, else its ancestor `ucp` (ucx-py)."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import time
from typing import Any

from .job import Job
from .peers import Peer

_MODULES = ("ucxx", "ucp")
_SETUP_TIMEOUT_S = 20.0


def why_not() -> str:
    """Why it cannot run here; "" when it can."""
    if not any(importlib.util.find_spec(module) for module in _MODULES):
        return "not installed: pip install ucxx-cu12 or ucxx-cu13 (345 MB; no GPU needed), Python 3.11 or later"
    return "" if importlib.util.find_spec("torch") else "not installed: pip install torch"


class Ucxx(Peer):
    """Tagged messages on buffers; the tag says who sends."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # No thread of its own for progress: it would share the core with the one that waits for it. Where processes
        # share cores they sleep, else they poll. The second name is ucx-py's.
        os.environ["UCXPY_PROGRESS_MODE"] = "polling" if job.values["cores"] else "blocking"
        os.environ["UCXPY_NON_BLOCKING_MODE"] = "1" if job.values["cores"] else ""
        self._library = importlib.import_module(next(name for name in _MODULES if importlib.util.find_spec(name)))
        self._buffers = {
            id(parts): [part.view(self.torch.uint8).numpy() for part in parts] for parts in (self.rows, self.replies)
        }
        self._loop = asyncio.new_event_loop()
        self._receiving: list[asyncio.Task[Any]] = []
        self._sending: list[asyncio.Task[Any]] = []
        self._loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        """An endpoint to every peer, by the address that it has left in the folder."""
        folder, process = self.job.folder, self.job.process
        partial = folder / f"ucxx.{process}.part"
        partial.write_bytes(bytes(self._library.get_worker_address()))
        partial.rename(folder / f"ucxx.{process}")  # whole, or not there yet
        until = time.monotonic() + _SETUP_TIMEOUT_S
        self._endpoints = []
        for peer in self.processes:
            path = folder / f"ucxx.{peer}"
            while not path.exists():
                if time.monotonic() > until:
                    raise RuntimeError(f"process {peer} has not published its UCX address")
                await asyncio.sleep(0.001)
            address = self._library.get_ucx_address_from_buffer(path.read_bytes())
            # Shared memory transports refuse UCX's handling of errors.
            endpoint = await self._library.create_endpoint_from_worker_address(address, endpoint_error_handling=False)
            self._endpoints.append(endpoint)

    def _start(self, parts: list[Any], is_sent: bool) -> list[asyncio.Task[Any]]:
        tasks = []
        for buffer, endpoint, peer in zip(self._buffers[id(parts)], self._endpoints, self.processes):
            if len(buffer) == 0:
                continue
            tag = self.job.process if is_sent else peer
            verb = endpoint.send if is_sent else endpoint.recv
            tasks.append(self._loop.create_task(verb(buffer, tag=tag, force_tag=True)))
        self._loop.run_until_complete(asyncio.sleep(0))  # they begin
        return tasks

    def _wait(self, tasks: list[asyncio.Task[Any]]) -> None:
        if tasks:
            self._loop.run_until_complete(_all(tasks))

    def dispatch_send(self) -> None:
        """Gathers and sends."""
        self.gather()
        self._sending = self._start(self.rows, is_sent=True)

    def combine_recv(self) -> None:
        """Waits and sums."""
        self._wait(self._receiving)
        self.sum()

    def dispatch_recv(self) -> None:
        """Waits."""
        self._wait(self._receiving)

    def combine_send(self) -> None:
        """The replies lie in order already."""
        self._sending = self._start(self.replies, is_sent=True)

    def settle(self) -> None:
        """Posts the next receives."""
        self._wait(self._sending)
        self._receiving = self._start(self.replies if self.job.is_attention else self.rows, is_sent=False)

    def close(self) -> None:
        """Takes back the receives that are posted, and leaves."""
        for endpoint in self._endpoints:
            endpoint.abort()
        for task in self._receiving:
            task.cancel()


async def _all(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        await task
