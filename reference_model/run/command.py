# SPDX-License-Identifier: Apache-2.0
"""What a command owes its user, however it ends: one line instead of a traceback, and results in the files that were
asked for, whatever becomes of the display."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
_NOBODY_READS = 141  # 128 + SIGPIPE


def run_command(program: str, body: Callable[[], int]) -> int:
    """Runs a command's body; the exit status."""
    mend_streams()
    try:
        status = body()
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: ended by SIGINT", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return _NOBODY_READS
    except OSError as error:  # a disk that is full, a file that went: what it says is all there is to say
        print(f"{program}: {error}", file=sys.stderr)
        if error.filename is None:
            _give_up_stdout()
        return 2


def mend_streams() -> None:
    """Output that is closed goes nowhere, and characters that its encoding lacks become "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _give_up_stdout() -> None:
    """Its reader has gone, or its disk is full: nothing may be written to it at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lasting:
    """Standard output whose end ends nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _give_up_stdout()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _give_up_stdout()


def outlast_stdout() -> None:
    """For commands whose results are kept in files: those are worth going on for, though nobody reads the rest."""
    sys.stdout = _Lasting(sys.stdout)  # type: ignore[assignment]


class Files:
    """The files that a command was asked for. One that cannot be written keeps no other one from being written."""

    def __init__(self) -> None:
        self._faults: list[str] = []

    def write(self, path: Path | None, write: Callable[[], Any]) -> bool:
        """Calls write() where there is a path; was it written?"""
        if path is None:
            return False
        try:
            write()
        except OSError as error:
            self._faults.append(f"cannot write {path}: {error.strerror or error}")
            return False
        return True

    def raise_faults(self) -> None:
        """Raises InputError for what could not be written."""
        if self._faults:
            raise InputError("; ".join(self._faults))
