# SPDX-License-Identifier: Apache-2.0
"""ncclPutSignal beside m2n (contenders/nccl_put.py, gpu/nccl.py): the signatures against NCCL's header where there is
one, and the whole path on CPUs with a library in NCCL's place."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import CXX
from tiers import needs_compiler

pytest.importorskip("torch")

from m2n.benchmarks.contenders import nccl_put  # noqa: E402
from m2n.benchmarks.gpu.suite import REFUSALS  # noqa: E402

FOLDER = Path(__file__).parent / "fake_nccl"
COMMAND = [sys.executable, "-m", "m2n.benchmarks.gpu.nccl", "--peer", "nccl-put"]
SMALL = ["--device", "cpu", "--tokens", "7", "--hidden", "64", "--rounds", "3", "--expert-ranks", "2"]

pytestmark = needs_compiler


def header_folders() -> list[Path]:
    """Of NCCL's header and CUDA's, where both are here: of NCCL_HOME, of the wheel beside torch, or the system's."""
    places = [Path(os.environ.get("NCCL_HOME", "/usr")) / "include"]
    if importlib.util.find_spec("nvidia") is not None and (spec := importlib.util.find_spec("nvidia.nccl")) is not None:
        places += [Path(folder, "include") for folder in spec.submodule_search_locations or ()]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    toolkits = [Path(os.path.realpath(nvcc)).parents[1] / "include", *Path("/usr/local").glob("cuda*/include")]
    nccl = [place for place in places if (place / "nccl.h").exists()]
    cuda = [place for place in toolkits if (place / "cuda_runtime.h").exists()]
    return [nccl[0], cuda[0]] if nccl and cuda else []


def compile_cxx(source: Path, folders: list[Path], *options: str | Path) -> None:
    includes = [f"-I{folder}" for folder in folders]
    command = [CXX, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", *includes, *options, source]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def claims() -> list[str]:
    """The table's signatures, sizes and values, as conditions in C++."""
    found = []
    results = (("ncclResult_t", nccl_put.RETURNS_RESULT), ("const char*", nccl_put.RETURNS_TEXT))
    for result, names in results:
        for name, arguments in names.items():
            found.append(f"std::is_same_v<decltype({name}), {result}({', '.join(arguments)})>")
    for name, ctype in nccl_put.VALUES.items():
        found.append(f"sizeof({name}) == {ctypes.sizeof(ctype)}")
    desc = nccl_put.WaitSignalDesc
    found += [f"offsetof(ncclWaitSignalDesc_t, {name}) == {getattr(desc, name).offset}" for name, _ in desc._fields_]
    found += [f"sizeof(ncclWaitSignalDesc_t) == {ctypes.sizeof(desc)}", "ncclSuccess == 0"]
    return [
        *found,
        f"ncclUint8 == {nccl_put.UINT8}",
        f"NCCL_WIN_COLL_SYMMETRIC == {nccl_put.COLL_SYMMETRIC}",
    ]


@pytest.mark.parametrize("whose", ["NCCL's", "the fake's"])
def test_signatures_are_those_of_the_header(whose: str, tmp_path: Path) -> None:
    folders = header_folders() if whose == "NCCL's" else [FOLDER]
    if not folders:
        pytest.skip("no nccl.h beside a cuda_runtime.h (pip install nvidia-nccl-cu12, or NCCL_HOME)")
    source = tmp_path / "claims.cc"
    lines = [f"static_assert({claim});" for claim in claims()]
    assert len(lines) > 25
    source.write_text("\n".join(["#include <nccl.h>", "#include <cstddef>", "#include <type_traits>", *lines]) + "\n")
    compile_cxx(source, folders, "-fsyntax-only")
    compile_cxx(FOLDER / "fake_nccl.cc", folders, "-fsyntax-only")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "libfake.so"
    compile_cxx(FOLDER / "fake_nccl.cc", [FOLDER], "-fPIC", "-shared", "-o", path)
    return path


def run(fake: Path, tmp_path: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FAKE_NCCL_FOLDER": str(tmp_path), **env}
    command = [*COMMAND, "--nccl", str(fake), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.slow
def test_rows_go_there_and_back_by_puts_beside_m2n(fake: Path, tmp_path: Path) -> None:
    done = run(fake, tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    words, *lines = done.stdout.splitlines()
    assert words == f"NCCL 2.29.2 ({fake})"
    puts, ours = map(json.loads, lines)
    assert puts["bytes"] == 2 * 7 * 64 * 2 and puts["samples"] == 3 and "nccl-put" in puts["name"]
    assert ours["limit"] == "nccl-put" and ours["limit_us"] == puts["p50_us"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, words, is_refusal",
    [
        ("lose", "the rows that came back are not those that were sent", False),
        ("windows", "symmetric windows are not supported between these ranks", True),
    ],
)
def test_lost_rows_fail_and_missing_windows_are_a_refusal(
    fake: Path, tmp_path: Path, fault: str, words: str, is_refusal: bool
) -> None:
    done = run(fake, tmp_path, *SMALL, FAKE_NCCL_FAULT=fault)
    assert done.returncode != 0 and words in done.stderr and "{" not in done.stdout
    assert bool(re.search(REFUSALS, done.stdout + done.stderr)) == is_refusal


@pytest.mark.parametrize(
    "version, words",
    [
        ("22809", "NCCL 2.28.9 .*: ncclPutSignal is not supported before 2.29"),
        ("22907", "NCCL 2.29.7 .*: two ranks on one GPU are not supported before 2.30"),
    ],
)
def test_an_old_nccl_is_refused_in_words(fake: Path, tmp_path: Path, version: str, words: str) -> None:
    done = run(fake, tmp_path, FAKE_NCCL_VERSION=version)
    assert done.returncode == 1 and re.search(words, done.stderr) and re.search(REFUSALS, done.stderr)


def test_no_nccl_is_a_refusal_too(tmp_path: Path) -> None:
    done = run(tmp_path / "libnccl.so.2", tmp_path)
    assert done.returncode == 1 and re.search(REFUSALS, done.stderr)
    assert "unable to load NCCL" in done.stderr


def test_nccl_says_why_a_call_failed(fake: Path) -> None:
    library = nccl_put.Library(str(fake))
    assert (library.version, library.version_words) == (22902, "2.29.2")
    with pytest.raises(nccl_put.NcclError, match=r"ncclGroupEnd: .*; no group has been started \(NCCL 2.29.2\)"):
        library.call("ncclGroupEnd")
