# SPDX-License-Identifier: Apache-2.0
"""All processes of one run at the Python boundary: `python -m m2n.benchmarks.forked_ranks FOLDER PROCESSES CONTENDER`.

Libraries are imported once, then a process is forked for each rank: 16 imports of torch take 20 s on two cores, and
their memory is shared this way. What a contender sets up, it sets up in its own process.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback

from . import contenders, python_ranks

_GRACE_S = 0.2  # for the others to say what they have seen


def main(folder: str, num_processes: str, name: str) -> int:
    """Exit status 1 when a process failed; then the others are killed."""
    contenders.import_libraries(name)
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
