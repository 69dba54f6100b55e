# SPDX-License-Identifier: Apache-2.0
"""The one way to start a Python process that runs a module of ours, whatever the folder it is started in holds."""

from __future__ import annotations

import json
import sys

_RUN = """import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""


def python_command(module: str, *arguments: object) -> list[str]:
    """The command of a process that runs `module` as `python -m` does, but imports from where this one does.

    With "-m", and with "-c" too, the current folder would come first in the child's path, and with it whatever m2n,
    torch or json lies there. "-I" leaves that out in every version of Python, and what PYTHONPATH says as well: what is
    in this process's path is handed over.
    """
    return [sys.executable, "-I", "-c", _RUN, json.dumps(sys.path), module, *map(str, arguments)]
