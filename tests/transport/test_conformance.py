# SPDX-License-Identifier: Apache-2.0
"""Every transport keeps the contract of csrc/transport: the sentences of conformance/suite.cc, on a line for each."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest
from bodies import config_of
from libraries import CXX, ROOT, build_libraries
from tiers import needs_compiler

import m2n

pytestmark = needs_compiler

UCX = pytest.mark.ucx
GPU = (pytest.mark.cuda, pytest.mark.nvcc, pytest.mark.slow)
# The native name, and how many sentences say nothing about this transport.
TRANSPORTS = [
    pytest.param("shm", 2, id="shm"),
    pytest.param(m2n.Faults(delay_us=100, jitter_us=100, seed=1)._transport("shm"), 1, id="faulty"),
    pytest.param(config_of("auto")._network("auto"), 2, id="auto"),
    pytest.param(config_of("tcp")._network("tcp"), 3, id="tcp"),
    pytest.param(config_of("ucx")._network("ucx"), 3, id="ucx", marks=UCX),
    pytest.param(config_of("ucx-put")._network("ucx"), 3, id="ucx-put", marks=UCX),
    pytest.param("pinned:cuda:0", 2, id="pinned", marks=GPU),
    pytest.param("cuda:0", 12, id="cuda", marks=GPU),
]


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


@functools.cache
def program_for(cuda: bool) -> Path:
    folder = build_libraries("m2n_transport", cuda=cuda)
    return compile_suite(folder / "conformance", cuda=cuda)


@pytest.mark.parametrize("name, num_not_here", TRANSPORTS)
def test_a_transport_keeps_the_contract(name: str, num_not_here: int) -> None:
    said = sentences(program_for(name.split(":")[0] in ("cuda", "pinned")), name)
    assert not said["WRONG"]
    assert len(said["not here"]) == num_not_here and said["holds"], said["not here"]
