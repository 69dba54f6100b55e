# SPDX-License-Identifier: Apache-2.0
"""What a command owes its user, however it ends: one line instead of a traceback, and results in the files that were
asked for, whatever becomes of the display."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import m2n

from .errors import InputError

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
_NOBODY_READS = 141  # 128 + SIGPIPE


class _OutputGone(Exception):
    """Standard output takes nothing any more."""


class _Output:
    """A standard stream that may be full, or that nobody may read any more: what is written then goes nowhere, and is
    not tried again at exit. It ends the command unless `is_lasting`."""

    def __init__(self, stream: Any, is_lasting: bool) -> None:
        self._stream, self.is_lasting = stream, is_lasting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if not self.is_lasting:
                raise _OutputGone from error


def run_command(program: str, body: Callable[[], int]) -> int:
    """Runs a command's body, which parses its arguments too; the exit status."""
    with _mended_streams():
        try:
            status = body()
            sys.stdout.flush()
            return status
        except InputError as error:
            text, status = str(error), 2
        except m2n.Error as error:
            text, status = str(error), 1
        except KeyboardInterrupt:
            text, status = "ended by SIGINT", _INTERRUPTED
        except _OutputGone as gone:
            error = gone.__cause__
            assert isinstance(error, OSError)
            if error.errno == errno.EPIPE:
                return _NOBODY_READS
            text, status = f"cannot write standard output: {error.strerror or error}", 2
        except OSError as error:  # a disk that is full, a file that went: what it says is all there is to say
            text, status = str(error), 2
        print(f"{program}: {text}", file=sys.stderr)
        return status


@contextlib.contextmanager
def _mended_streams() -> Iterator[None]:
    """Streams that are closed are empty and go nowhere, characters that an encoding lacks become "?"; what becomes of
    standard error ends nothing."""
    before = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    with contextlib.ExitStack() as opened:
        for name, stream in before.items():
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
            elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
            setattr(sys, name, stream if name == "stdin" else _Output(stream, is_lasting=name == "stderr"))
        try:
            yield
        finally:
            outlast_stdout()
            sys.stdout.flush()
            sys.stderr.flush()
            for name, stream in before.items():
                setattr(sys, name, stream)


def outlast_stdout() -> None:
    """For commands whose results are kept in files: those are worth going on for, though nobody reads the rest."""
    if isinstance(sys.stdout, _Output):
        sys.stdout.is_lasting = True


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
        except InputError as error:  # it names the file
            self._faults.append(str(error))
            return False
        return True

    def raise_faults(self) -> None:
        """Raises InputError for what could not be written."""
        if self._faults:
            raise InputError("; ".join(self._faults))
