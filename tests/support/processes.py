# SPDX-License-Identifier: Apache-2.0
"""Processes that tests start: programs that use the modules beside this one, and forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent


def program(code: str, *arguments: object) -> list[str]:
    """The command of a program that finds the modules of tests/support."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n{code}", *map(str, arguments)]


def run_body(name: str, *arguments: Any, timeout: float = 60.0) -> None:
    """bodies.<name>(*arguments) in a Python of its own, which must end well."""
    code = f"import sys, bodies; bodies.{name}(*sys.argv[1:])"
    done = subprocess.run(program(code, *arguments), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def fork(call: Callable[[], Any]) -> Callable[[], str]:
    """A forked child runs call(). The returned function waits for it and tells how it ended, in words."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # a child that hangs is ended, and its end is the answer
        try:
            text = f"returned {call()!r}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)

    def wait() -> str:
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return text if status == 0 else f"ended with {status}"

    return wait
