# SPDX-License-Identifier: Apache-2.0
"""The one way to start a Python process that runs a module of ours, whatever the folder it is started in holds."""

from __future__ import annotations

import sys

# Until the path is set nothing may be imported but what is built in.
_RUN = """import sys; sys.path[:] = eval(sys.argv.pop(1))
import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def python_command(module: str, *arguments: object) -> list[str]:
    """The command of a process that runs `module` as `python -m` does, but imports from where this one does.

    With "-m", and with "-c" too, the current folder would come first in the child's path, and with it whatever m2n,
    torch or json lies there. "-P" and "-I" would leave that out, but the one is of Python 3.11, and the other leaves
    out the user's own packages and PYTHON* variables too. Ctrl-C reaches the whole group of a terminal: the process
    that has started the child alone decides what it means.
    """
    path = ascii([folder for folder in sys.path if isinstance(folder, str)])
    return [sys.executable, "-c", _RUN, path, module, *map(str, arguments)]
