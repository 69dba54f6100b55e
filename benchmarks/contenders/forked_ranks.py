# SPDX-License-Identifier: Apache-2.0
"""All processes of one run at the Python boundary:
`python -m m2n.benchmarks.contenders.forked_ranks FOLDER PROCESSES CONTENDER`.

Libraries are imported once, then a process is forked for each rank: it sets up its contender itself, but neither the
time of an import of torch nor its memory is paid for each rank.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback

from . import python_ranks

_GRACE_S = 0.2  # for the others to say what they have seen
_IMPORTED_ONCE = ("m2n.benchmarks.contenders.python", "torch", "torch.distributed")


def main(folder: str, num_processes: str, name: str) -> int:
    """Exit status 1 when a process failed; then the others are killed."""
    for module in _IMPORTED_ONCE[: 1 if name == "m2n" else None]:  # ranks of m2n need numpy only
        importlib.import_module(module)
    gc.freeze()  # the pages of what all share stay shared
    children = {_fork(folder, process, name) for process in range(int(num_processes))}
    while children:
        child, status = os.wait()
        children.remove(child)
        if status != 0:
            time.sleep(_GRACE_S)
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _fork(folder: str, process: int, name: str) -> int:
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        status = python_ranks.main(folder, str(process), name)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # past the threads of libraries, which may wait for peers that are gone


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
