# SPDX-License-Identifier: Apache-2.0
"""`python -m m2n info` prints what this build can do; `python -m m2n store URL` serves a store until interrupted;
`python -m m2n diagnose` says by what two ranks reach each other, how fast, and why not by the rest; `python -m m2n
cmakedir` prints the folder of the CMake package of the C++ headers, for -Dm2n_DIR=."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from pathlib import Path

from . import _C, Error, SetupError, features, host_store

_INTERRUPTED, _NOBODY_READS = 130, 141  # as shells have it: 128 and the signal


def _print_info() -> None:
    for key, value in features().items():
        print(f"{key:12} {', '.join(value) if isinstance(value, list) else value}")


def _serve_store(url: str) -> None:
    with host_store(url) as store:
        print(f"m2n: store at {store.url}; interrupt to end", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def _print_cmake_dir() -> None:
    # Beside the native module: in an editable installation the Python sources lie elsewhere.
    folder = Path(_C.__file__).parent / "share/cmake/m2n"
    if not (folder / "m2nConfig.cmake").is_file():
        raise SetupError("the C++ headers were not installed with m2n; install m2n again: pip install .")
    print(folder)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m m2n", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this build can do")
    commands.add_parser("cmakedir", help="the folder to pass to CMake as -Dm2n_DIR=")
    store = commands.add_parser("store", help="serve a store that ranks find each other through")
    store.add_argument("url", nargs="?", default="tcp://127.0.0.1:29400")
    diagnosis = commands.add_parser("diagnose", help="how two ranks reach each other, here or on two hosts")
    diagnosis.add_argument("--role", choices=("attention", "expert"), help="of this side; default: both, on this host")
    diagnosis.add_argument("--store", help="that both sides reach: a path, or tcp://host:port (needed with --role)")
    arguments = parser.parse_args(argv)
    if arguments.command == "diagnose" and (arguments.role is None) != (arguments.store is None):
        parser.error("diagnose: give --role and --store together, or neither")
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        text, status = "ended by SIGINT", _INTERRUPTED
    except (Error, ValueError) as error:
        text, status = str(error), 2
    except BrokenPipeError:  # nobody reads on
        _give_up_stdout()
        return _NOBODY_READS
    except OSError as error:
        _give_up_stdout()
        text, status = str(error), 2
    print(f"m2n: {text}", file=sys.stderr)
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        _print_info()
    elif arguments.command == "cmakedir":
        _print_cmake_dir()
    elif arguments.command == "diagnose":
        from .diagnose import diagnose

        return diagnose(arguments.role, arguments.store)
    else:
        _serve_store(arguments.url)
    return 0


def _give_up_stdout() -> None:
    """What could not be written is not tried again at exit."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
