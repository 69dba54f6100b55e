# SPDX-License-Identifier: Apache-2.0
"""Ranks as a child process of the launcher: the job comes in on standard input, events go out on a pipe.

A rank is a thread; most children have one. Standard input stays open as long as the launcher lives; its end means that
the launcher is gone, however that came about.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import m2n

from .config import ModelConfig
from .errors import InputError
from .run_config import RunConfig


def _exit_with_launcher() -> None:
    """End this process, whatever it is doing, when the launcher's end of standard input closes."""
    while os.read(0, 1):
        pass
    os._exit(3)


def main() -> int:
    """Run the ranks of the job; exit status 0, 2 for bad input and 1 for any other error."""
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    # Ranks on one GPU are streams that wait for each other: none may stand behind another one in a queue, and no kernel
    # may be loaded while one spins.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    # Else torch's store has two lines for each second that a rank waits for another one's address; m2n has its own.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    lock = threading.Lock()
    statuses: queue.Queue[int] = queue.Queue()
    # Nobody may wait on a GPU while another one's kernels run for the first time.
    all_loaded = threading.Barrier(len(job["ranks"]), action=_settle)

    def run_one(role: str, rank: int, prompts: dict[str, list[int]]) -> None:
        def emit(event: dict[str, Any]) -> None:
            with lock:
                events.write(json.dumps({**event, "role": role, "rank": rank}) + "\n")
                events.flush()

        statuses.put(_run_one(job, role, rank, prompts, emit, all_loaded))

    threads = [threading.Thread(target=run_one, kwargs=about, daemon=True) for about in job["ranks"]]
    for thread in threads:
        thread.start()
    for _ in threads:
        status = statuses.get()
        if status != 0:
            return status  # the launcher ends this process, and the other threads with it
    return 0


@functools.cache
def _settle() -> None:
    """Once, when no rank has a comm yet."""
    from .worker import settle  # torch takes seconds to load: bad input need not wait for it

    settle()


def _run_one(
    job: dict[str, Any],
    role: str,
    rank: int,
    prompts: dict[str, list[int]],
    emit: Callable[[dict[str, Any]], None],
    all_loaded: threading.Barrier,
) -> int:
    try:
        run = RunConfig(**job["run"])
        run.check_model(ModelConfig.from_directory(run.checkpoint))
        from .worker import run_rank

        numbered = {int(idx): token_ids for idx, token_ids in prompts.items()}
        run_rank(run, role, rank, numbered, job["store"], emit, meet=all_loaded.wait)
    except Exception as error:  # every kind of failure must reach the launcher as this rank's error
        is_input = isinstance(error, InputError)
        if not is_input and not isinstance(error, (m2n.Error, threading.BrokenBarrierError)):
            traceback.print_exc()
        emit({"event": "error", "kind": type(error).__name__, "text": str(error), "is_input": is_input})
        all_loaded.abort()
        return 2 if is_input else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
