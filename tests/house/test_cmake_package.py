# SPDX-License-Identifier: Apache-2.0
"""What C++ programs use: the installed headers, libraries and CMake package. examples/cpp is built against them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import build_libraries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples/cpp"
GENERATOR = ["-G", "Ninja"] if shutil.which("ninja") else []
# Without the second option the headers of packages count as the system's, of which compilers do not warn.
STRICT = ["-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror", "-DCMAKE_NO_SYSTEM_FROM_IMPORTED=ON"]
ENDLESS = "4000000000"  # rounds
LOST_WITHIN_S = 3  # less than the example's deadlines: the loss itself must end a wait


def must(*command: str | Path, **options: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(source: Path, directory: Path, *options: str | Path) -> Path:
    must("cmake", "-S", source, "-B", directory, *GENERATOR, *options)
    must("cmake", "--build", directory, "--parallel", "2")
    return directory


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed libraries, moved to another place than they were installed to."""
    place = tmp_path_factory.mktemp("libraries")
    directory = build_libraries()
    looked_for = re.findall(r"^(?:Python|pybind11)_\w+", (directory / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert not looked_for, "libraries need no Python"
    must("cmake", "--install", directory, "--prefix", place / "first")
    return (place / "first").rename(place / "moved, with a space")


@pytest.fixture(scope="module")
def examples(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as a user builds them, from a copy: they need nothing of this tree."""
    place = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, place / "source")
    return build(place / "source", place / "build", f"-DCMAKE_PREFIX_PATH={prefix}", *STRICT)


def test_the_package_names_no_place_of_the_build(prefix: Path) -> None:
    files = [path for path in prefix.rglob("*.cmake") if path.is_file()]
    assert {"m2nConfig.cmake", "m2nConfigVersion.cmake", "m2nTargets.cmake"} <= {path.name for path in files}
    for path in files:
        assert not re.search(f"{re.escape(str(prefix.parent))}|{re.escape(str(ROOT))}|-W(all|extra)", path.read_text())


def test_two_threads(examples: Path) -> None:
    assert "as expected" in must(examples / "two_threads")


def test_two_processes(examples: Path) -> None:
    lines = must(examples / "two_processes", "100").splitlines()
    assert lines[1:] == [
        "token 0: experts 0 and 1 made 125 of 100",
        "token 1: experts 2 and 0 made 216 of 108",
        "token 2: experts 3 and 2 made 377 of 116",
    ]


def test_gate_dispatch(examples: Path) -> None:
    """A kernel of a user's, on CPU threads; it compares itself with the oracle's arithmetic, bit for bit."""
    lines = must(examples / "gate_dispatch").splitlines()
    assert len(lines) == 8 and all(line.endswith("rows, as the oracle") for line in lines), lines
    assert not list(examples.glob("gate_dispatch_cuda")), "these libraries were built without CUDA"


@pytest.mark.nvcc
def test_gate_dispatch_compiles_as_a_kernel(prefix: Path, tmp_path: Path) -> None:
    """Against the installed headers, and free of warnings. Where there is a GPU the example's own build runs it."""
    options = ("-arch=sm_90", "-std=c++20", "-fmad=false", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra")
    include = tmp_path / "include"
    include.symlink_to(prefix / "include")  # nvcc takes a comma in a path for two paths
    source = shutil.copytree(EXAMPLES, tmp_path / "source") / "gate_dispatch.cu"
    must("nvcc", *options, f"-I{include}", f"-I{include / 'm2n'}", "-c", source, "-o", tmp_path / "gate_dispatch.o")


@pytest.mark.parametrize("killed, left", [("expert", "attention"), ("attention", "expert")])
def test_a_killed_process_ends_the_other(examples: Path, killed: str, left: str) -> None:
    program = subprocess.Popen([examples / "two_processes", ENDLESS], stdout=-1, stderr=-1, text=True)
    assert program.stdout
    process = dict(re.findall(r"(\w+) rank 0 is process (\d+)", program.stdout.readline()))
    with pytest.raises(subprocess.TimeoutExpired):
        program.communicate(timeout=0.5)  # it is in the middle of its rounds
    os.kill(int(process[killed]), signal.SIGKILL)
    # Ends when both have closed what they write to.
    _, errors = program.communicate(timeout=LOST_WITHIN_S)
    assert program.returncode == (1 if killed == "expert" else -signal.SIGKILL)
    assert re.fullmatch(rf"{left} rank 0: .*{killed} rank 0 is lost: its process died.*; call recover.*\n", errors), (
        errors
    )


@pytest.fixture(scope="module")
def package() -> Path:
    return Path(must(sys.executable, "-m", "m2n", "cmakedir").strip())


class TestHeadersOfThePythonPackage:
    def test_the_header_only_example_runs(self, package: Path, tmp_path: Path) -> None:
        directory = build(EXAMPLES, tmp_path, f"-Dm2n_DIR={package}", *STRICT)
        assert "as expected" in must(directory / "two_threads")
        assert not list(directory.glob("two_processes"))

    def test_each_header_stands_alone(self, package: Path, tmp_path: Path) -> None:
        """In the form in which users include it, and free of warnings."""
        headers = sorted(path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc/core").glob("*.h"))
        assert headers
        for header in headers:
            (tmp_path / f"{header.stem}.cc").write_text(f"#include <m2n/{header}>\n#include <m2n/{header}>\n")
        (tmp_path / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.22)\nproject(headers LANGUAGES CXX)\n"
            "find_package(m2n CONFIG REQUIRED COMPONENTS core device)\nfile(GLOB sources *.cc)\n"
            "add_library(headers STATIC ${sources})\ntarget_link_libraries(headers PRIVATE m2n::core)\n"
        )
        build(tmp_path, tmp_path / "build", f"-Dm2n_DIR={package}", *STRICT)

    def test_asking_it_for_libraries_is_an_error_that_says_so(self, package: Path, tmp_path: Path) -> None:
        (tmp_path / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.22)\nproject(libraries LANGUAGES CXX)\n"
            "find_package(m2n CONFIG REQUIRED COMPONENTS exchange)\n"
        )
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dm2n_DIR={package}"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=100)
        assert done.returncode != 0 and "M2N_PYTHON=OFF" in done.stderr
