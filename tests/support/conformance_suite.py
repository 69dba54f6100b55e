# SPDX-License-Identifier: Apache-2.0
"""The sentences of tests/transport/conformance/suite.cc: compiled, and said of a transport."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from libraries import CXX, ROOT, build_libraries


def compile_suite(program: Path, root: Path = ROOT, cuda: bool = False, instead: tuple[Path, ...] = ()) -> Path:
    """The suite, with the transports of a source tree; `instead`: sources that count before those of the same names."""
    library = build_libraries("m2n_transport", root, cuda) / "libm2n_transport.a"
    flags = ["-std=c++20", "-O0", f"-DM2N_HAS_CUDA={int(cuda)}", f"-I{root / 'csrc'}", f"-I{ROOT / 'tests/transport'}"]
    # nvcc brings the runtime of CUDA.
    compiler = ["nvcc", "-lrt"] if cuda else [CXX, "-Wall", "-Wextra", "-pthread"]
    sources = [str(path) for path in (ROOT / "tests/transport/conformance/suite.cc", *instead)]
    command = [
        *compiler,
        *flags,
        *sources,
        *(["-Wl,--allow-multiple-definition"] if instead else []),
        str(library),
        "-ldl",
    ]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=110)
    return program


def sentences(program: Path, name: str) -> dict[str, list[str]]:
    """What the suite said of a transport: sentences that are WRONG, that hold, and that are not here."""
    quiet = {**os.environ, "UCX_LOG_LEVEL": "fatal"}  # it has its own words for a peer that is gone, on stdout
    done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=100, env=quiet)
    said: dict[str, list[str]] = {"WRONG": [], "holds": [], "not here": []}
    for line in done.stdout.splitlines():
        said[line[:10].strip()].append(line[10:])
    assert (done.returncode != 0) == bool(said["WRONG"]), done.stdout + done.stderr[-2000:]
    return said
