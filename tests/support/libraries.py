# SPDX-License-Identifier: Apache-2.0
"""What tests compile once: the C++ libraries, whichever worker of pytest needs them first, and large headers."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "g++")
# The sources of a library as one: headers are half of what they take to compile. The installation compiles each alone.
TOGETHER = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")


def build_libraries(target: str = "all", root: Path = ROOT, cuda: bool = False) -> Path:
    """The folder with libm2n_exchange.a and libm2n_transport.a of a source tree, from `cmake -DM2N_PYTHON=OFF`."""
    directory = root / ("build/libraries-cuda" if cuda else "build/libraries")
    directory.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # Unoptimised: compiles in half the time.
    options = ["-DM2N_PYTHON=OFF", f"-DM2N_CUDA={'ON' if cuda else 'OFF'}", "-DCMAKE_BUILD_TYPE=Debug", *TOGETHER]
    configure = ["cmake", "-S", str(root), "-B", str(directory), *generator, *options]
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(directory), "--parallel", "2", "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return directory


@functools.cache
def precompile(header: Path, flags: tuple[str, ...]) -> str:
    """An option by which `#include <header>` finds it compiled already: half of what a small program takes."""
    directory = ROOT / "build/headers" / f"{header.stem}-{zlib.crc32(repr(flags).encode()):08x}"
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / f"{os.getpid()}.made"  # not in its place before it is whole: another worker may be reading there
    source = ["-x", "c++-header", str(header), "-o", str(made)]
    command = [CXX, *flags, f"-I{header.parent}", "-c", *source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
    made.replace(directory / f"{header.name}.gch")
    return f"-I{directory}"
