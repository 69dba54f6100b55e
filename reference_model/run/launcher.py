# SPDX-License-Identifier: Apache-2.0
"""Launcher: starts the ranks of a run as direct children, passes on their events, ends them all."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import m2n

from ..console.children import python_command
from ..errors import InputError
from ..run_config import ATTENTION, RunConfig
from .result import RunResult

# After a first failure: how long to listen for the error that caused it.
_CAUSE_S = 1.0
# From the polite signal to the other one.
_TERMINATE_S = 2.0
_STDERR_LINES = 20


class RankFailed(RuntimeError):
    """A rank ended with an error; the text names it and says what it said."""


class Interrupted(BaseException):
    """The launcher was told to end by a signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class _Child:
    """The process of one rank, or of all, with a thread each for its events and its standard error."""

    def __init__(self, job: dict[str, Any], events: queue.Queue[tuple[_Child, Any]]) -> None:
        first, *others = job["ranks"]
        self.role, self.rank = first["role"], first["rank"]
        self.name = "the process of all ranks" if others else f"{self.role} rank {self.rank}"
        self.error: dict[str, Any] | None = None
        self.num_left = 1 + len(others)  # ranks that are not done
        self.last_lines: deque[str] = deque(maxlen=_STDERR_LINES)
        read_fd, write_fd = os.pipe()
        try:
            self.process = subprocess.Popen(
                python_command("m2n.reference_model.run.child", write_fd),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(write_fd,),
            )
        finally:
            os.close(write_fd)
        self._threads = [
            threading.Thread(target=self._pass_on_events, args=(read_fd, events), daemon=True),
            threading.Thread(target=self._pass_on_stderr, args=(events,), daemon=True),
            threading.Thread(target=self._send_job, args=(json.dumps(job),), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _send_job(self, text: str) -> None:
        assert self.process.stdin is not None
        # A child that has died already is reported by the end of its events.
        with contextlib.suppress(OSError):
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()

    def _pass_on_events(self, read_fd: int, events: queue.Queue[tuple[_Child, Any]]) -> None:
        with os.fdopen(read_fd, encoding="utf-8") as pipe:
            for line in pipe:
                # A killed child may leave half a line.
                with contextlib.suppress(ValueError):
                    events.put((self, json.loads(line)))
        self.process.wait()
        self._threads[1].join(timeout=1)
        events.put((self, None))

    def _pass_on_stderr(self, events: queue.Queue[tuple[_Child, Any]]) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self.last_lines.append(text)
            events.put((self, {"event": "stderr", "role": self.role, "rank": self.rank, "text": text}))

    def failure(self) -> str:
        """What this process died of."""
        status = self.process.returncode
        if self.error is not None:
            return f"{self.failed_rank} failed: {self.error['kind']}: {self.error['text']}"
        if status is not None and status < 0:
            return f"{self.name} was killed by {signal.Signals(-status).name}"
        said = "".join(f"\n  {line}" for line in self.last_lines)
        return f"{self.name} ended with status {status}{said}"

    @property
    def failed_rank(self) -> str:
        return self.name if self.error is None else f"{self.error['role']} rank {self.error['rank']}"

    def fail(self, error: dict[str, Any]) -> None:
        """Of several ranks the first that failed of itself counts."""
        if self.error is None or self.is_consequence():
            self.error = error

    def is_consequence(self) -> bool:
        """Did it only notice that another rank is gone?"""
        return self.error is not None and self.error["kind"] in ("PeerLost", "Timeout", "BrokenBarrierError")


class Launcher:
    """One run: `events` starts the ranks and yields what they report; leaving it, in any way, ends them."""

    def __init__(self, run: RunConfig, prompts: list[list[int]]) -> None:
        self.run, self.prompts = run, prompts
        self.children: list[_Child] = []
        self.result = RunResult(run, prompts)

    def events(self) -> Generator[dict[str, Any], None, None]:
        """Yield {"event": "ready" | "tokens" | "stderr" | "routes" | "done", "role", "rank", ...} to the end.

        Close the generator (contextlib.closing) to end a run early. Raises RankFailed or InputError.
        """
        with _signals_raise():
            store = m2n.host_store("tcp://127.0.0.1:0")
            try:
                yield from self._events(store.url)
            finally:
                self.stop()
                store.close()

    def _events(self, store_url: str) -> Iterator[dict[str, Any]]:
        arrived: queue.Queue[tuple[_Child, Any]] = queue.Queue()
        ranks = []
        for role, rank in self.run.ranks:
            share = self.run.share(rank, len(self.prompts)) if role == ATTENTION else []
            prompts = {str(idx): self.prompts[idx] for idx in share}
            ranks.append({"role": role, "rank": rank, "prompts": prompts})
        for together in [ranks] if self.run.is_one_process else [[each] for each in ranks]:
            self.children.append(_Child({"run": self.run.as_dict(), "ranks": together, "store": store_url}, arrived))
        num_ended = 0
        while num_ended < len(self.children):
            child, event = arrived.get()
            if event is None:
                num_ended += 1
                if child.process.returncode != 0 or child.num_left:
                    self._fail(child, arrived)
                continue
            if event["event"] == "error":
                child.fail(event)
                self._fail(child, arrived)
            child.num_left -= event["event"] == "done"
            self.result.add(event)
            yield event

    def _fail(self, first: _Child, arrived: queue.Queue[tuple[_Child, Any]]) -> None:
        """Raise for the rank that failed first of itself, not for one that only lost its peer."""
        failed, deadline = [first], time.monotonic() + _CAUSE_S
        while all(child.is_consequence() for child in failed) and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                child, event = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
                if event is None and child.process.returncode != 0 and child not in failed:
                    failed.append(child)
                elif event is not None and event["event"] == "error":
                    child.fail(event)
                    failed.append(child)
        cause = next((child for child in failed if not child.is_consequence()), first)
        if cause.error is not None and cause.error["is_input"]:
            raise InputError(f"{cause.failed_rank}: {cause.error['text']}")
        raise RankFailed(cause.failure())

    def stop(self) -> None:
        """End every child that still runs, and wait for it."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + _TERMINATE_S
        for child in self.children:
            try:
                child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            with contextlib.suppress(OSError):
                if child.process.stdin is not None:
                    child.process.stdin.close()


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within this, SIGINT, SIGTERM and SIGHUP raise Interrupted (if this is the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signal_number: int, frame: Any) -> None:
        raise Interrupted(signal_number)

    previous = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
