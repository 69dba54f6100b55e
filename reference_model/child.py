# SPDX-License-Identifier: Apache-2.0
"""A rank as a child process of the launcher: the job comes in on standard input, events go out on a pipe.

Standard input stays open as long as the launcher lives; its end means that the launcher is gone, however
that came about.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
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
    """Run one rank; exit status 0, 2 for bad input and 1 for any other error."""
    # Ctrl-C reaches the whole terminal group; the launcher alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_launcher, daemon=True).start()

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        run = RunConfig(**job["run"])
        run.check_model(ModelConfig.from_directory(run.checkpoint))
        from .worker import run_rank  # torch takes seconds to load: bad input need not wait for it

        prompts = {int(idx): token_ids for idx, token_ids in job["prompts"].items()}
        run_rank(run, job["role"], job["rank"], prompts, job["store"], emit)
    except Exception as error:  # every kind of failure must reach the launcher as this rank's error
        is_input = isinstance(error, InputError)
        if not is_input and not isinstance(error, m2n.Error):
            traceback.print_exc()
        emit({"event": "error", "kind": type(error).__name__, "text": str(error), "is_input": is_input})
        return 2 if is_input else 1
    return 0
