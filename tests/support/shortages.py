# SPDX-License-Identifier: Apache-2.0
"""Programs that lack something; each prints one line."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import m2n

ONE = m2n.Placement.block(4, 1)


def shape_of(num_bytes: int) -> m2n.Shape:
    """A peer's rows take this many bytes at an expert rank, and little at an attention rank's."""
    hidden, slots = 1024, 2
    tokens = num_bytes // (hidden * 4 * slots)
    return m2n.Shape(hidden, 4, 2, tokens, dispatch_dtype="float32", combine_dtype="float32")


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except m2n.SetupError as error:
        return f"SetupError: {error}"
    return "made"


def expert(megabytes: int) -> m2n.ExpertComm:
    return m2n.ExpertComm(0, shape_of(megabytes << 20), ONE, tempfile.mkdtemp())


def offered(megabytes: int) -> str:
    comm = expert(megabytes)
    return outcome(lambda: comm._native.offer(0, 1))


def with_small_files(limit_bytes: str) -> None:
    # As in a program in C++: Python ignores the signal that the kernel sends.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    print(outcome(lambda: expert(64)))


def join(cgroup: str) -> None:
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))


def in_cgroup(cgroup: str, megabytes: str) -> None:
    join(cgroup)
    print(outcome(lambda: expert(int(megabytes))))


def with_more_peers_than_fit(cgroup: str, megabytes: str) -> None:
    join(cgroup)
    comm = expert(int(megabytes))
    for rank in range(100):
        told = outcome(lambda rank=rank: comm._native.offer(rank, rank))  # type: ignore[misc]
        if told != "made":
            print(rank, told)
            return
    print("all fit")


def with_page_cache(cgroup: str, megabytes: str) -> None:
    """The cgroup is full of what the kernel can give back."""
    join(cgroup)
    with tempfile.NamedTemporaryFile(dir=os.getcwd()) as file:
        for _ in range(int(megabytes)):
            file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        print(offered(int(megabytes)))


def with_a_send_area_beside(cgroup: str, megabytes: str) -> None:
    """Both ranks are here: the one's memory fits, and then the other's send area does not."""
    join(cgroup)
    shape, store = shape_of(int(megabytes) << 20), tempfile.mkdtemp()
    config = m2n.Config(transport="tcp", connect_timeout_s=10)
    server = m2n.ExpertComm(0, shape, ONE, store, config=config)
    print(outcome(lambda: m2n.AttentionComm(0, shape, ONE, store, config=config)))
    server.close()


def with_little_in_dev_shm() -> None:
    size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    print(size, offered(64))


def with_interrupted_calls() -> None:
    print(offered(64))


def without_threads() -> None:
    """Of comms that have threads of their own; then whether this thread's signals are still its own."""
    store, no_more_threads = tempfile.mkdtemp(), ctypes.c_int.in_dll(ctypes.CDLL(None), "no_more_threads")
    shape, two = shape_of(1 << 20), m2n.Placement.block(4, 2)
    late = m2n.Config(faults=m2n.Faults(delay_us=1))
    no_more_threads.value = 1
    print(outcome(lambda: m2n.ExpertComm(0, shape, two, store)))
    no_more_threads.value = 0
    emulated = m2n.ExpertComm(0, shape, two, store, device="emulated")
    no_more_threads.value = 1
    print(outcome(lambda: m2n.ExpertComm(1, shape, two, store, config=late)))
    print(outcome(lambda: emulated.wait_work(0.1)))
    no_more_threads.value = 0
    print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
