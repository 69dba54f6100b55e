# SPDX-License-Identifier: Apache-2.0
"""What is installed and how: the wheel's files, an environment without torch, and builds with and without CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
slow = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=500, **options)  # type: ignore[call-overload]


def must(*command: str | Path, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def cmake_configure(directory: Path, *options: str, **more: object) -> subprocess.CompletedProcess[str]:
    pybind11 = must(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    python = [f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}"]
    return run("cmake", "-S", ROOT, "-B", directory, *generator, *python, *options, **more)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, by the tools of this environment: what is installed is not compiled again."""
    place = tmp_path_factory.mktemp("a wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    must(sys.executable, "-m", "pip", "wheel", *options, "-w", place, ROOT, cwd=place)
    (found,) = place.glob("m2n-*.whl")
    return found


def test_info_says_what_this_build_can_do() -> None:
    text = must(sys.executable, "-m", "m2n", "info")
    assert re.search(r"^version +\d", text, re.MULTILINE) and re.search(r"^transports .*shm", text, re.MULTILINE)


def test_the_commands_are_installed() -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    assert "--attention-ranks" in must(scripts / "m2n-generate", "--help")


@pytest.mark.slow
def test_the_source_package_holds_what_people_read(tmp_path: Path) -> None:
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    must(sys.executable, "-c", code, tmp_path, cwd=ROOT)
    (found,) = tmp_path.glob("m2n-*.tar.gz")
    with tarfile.open(found) as package:
        names = {member.split("/", 1)[1] for member in package.getnames()}
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc/README.md", ROOT / "tests/README.md"]
    assert {page.relative_to(ROOT).as_posix() for page in pages} <= names


class TestWheel:
    pytestmark = slow

    def test_it_holds_the_package_and_its_data(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        for wanted in (
            r"m2n/_C\.\S+\.so",
            r"m2n/_C\.pyi",
            r"m2n/py\.typed",
            r"m2n/__init__\.py",
            r"m2n/reference_model/generate\.py",
            r"m2n/reference_model/checkpoints/[^/]+/model\.safetensors",
            r"m2n/reference_model/checkpoints/[^/]+/tokenizer\.json",
            r"m2n/reference_model/checkpoints/[^/]+/config\.json",
            r"m2n/reference_model/checkpoints/[^/]+/LICENSE",
        ):
            assert any(re.fullmatch(wanted, name) for name in names), f"{wanted} is not in the wheel"

    def test_it_holds_each_python_file_and_nothing_else(self, wheel: Path) -> None:
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        sources = {f"m2n/{path.relative_to(ROOT / 'm2n')}" for path in (ROOT / "m2n").glob("*.py")}
        for part in ("reference_model", "benchmarks"):
            sources |= {f"m2n/{path.relative_to(ROOT)}" for path in (ROOT / part).rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == sources
        assert {name.split("/")[0] for name in names} == {"m2n"}, "top-level modules other than m2n"
        native = [f"contenders/native/{name}" for name in ("contender.h", "count_copies.c", "mpi.cc", "ucx.cc")]
        compiled_there = {f"m2n/benchmarks/{name}" for name in (*native, "exchange/instructions.cc")}
        sources = {name for name in names if name.endswith((".cc", ".h", ".c", ".cu"))}
        folders = [ROOT / "csrc" / name for name in ("core", "transport", "exchange")]
        headers = {f"m2n/include/m2n/{path.relative_to(ROOT / 'csrc')}" for f in folders for path in f.rglob("*.h")}
        assert sources == compiled_there | headers
        assert "m2n/share/cmake/m2n/m2nConfig.cmake" in names
        assert not [name for name in names if name.endswith((".pyc", ".a"))]

    def test_it_works_without_torch_and_says_what_generating_needs(self, wheel: Path, tmp_path: Path) -> None:
        environment = tmp_path / "no torch"
        venv.create(environment, with_pip=False)
        (site,) = environment.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(site)
        # numpy is all that m2n needs; taken from here, so that nothing is downloaded.
        import numpy

        for entry in Path(numpy.__file__).parent.parent.glob("numpy*"):
            (site / entry.name).symlink_to(entry)
        python = environment / "bin/python"
        code = "import m2n, sys; print(m2n.__file__, m2n.__version__, 'torch' in sys.modules)"
        path, version, has_torch = must(python, "-c", code, cwd=tmp_path).rsplit(maxsplit=2)
        assert path.startswith(str(site)) and version[0].isdigit() and has_torch == "False"
        assert "shm" in must(python, "-m", "m2n", "info", cwd=tmp_path)
        example = (
            "import m2n, numpy as np; from m2n.testing import run_ranks, serve, expert_outputs\n"
            "shape = m2n.Shape(8, 4, 2, 4, dispatch_dtype='float32', combine_dtype='float32')\n"
            "def attention(comm):\n"
            "    ids, weights = np.array([[0, 3]]), np.ones((1, 2), np.float32)\n"
            "    comm.dispatch_send(np.ones((1, 8), np.float32), comm.route(ids, weights))\n"
            "    return comm.combine_recv()\n"
            "def expert(comm):\n"
            "    return serve(comm, 1, lambda batch: batch.gather())\n"
            "print(run_ranks((attention, expert), 1, 2, shape=shape)['attention', 0].sum())\n"
        )
        assert must(python, "-c", example, cwd=tmp_path).split() == ["16.0"]
        done = run(python, "-m", "m2n.reference_model", "--prompt", "In the beginning", cwd=tmp_path)
        assert done.returncode == 2 and "pip install" in done.stderr and "m2n[model]" in done.stderr
        assert "Traceback" not in done.stderr

    def test_numbers_of_the_wheel_agree(self, wheel: Path) -> None:
        version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert version and wheel.name.startswith(f"m2n-{version[1]}-")


class TestCuda:
    pytestmark = slow

    def test_on_without_a_compiler_is_an_error_that_says_what_to_do(self, tmp_path: Path) -> None:
        # A PATH that holds the tools of a build, but no nvcc.
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("cmake", "ninja", "make", "g++", "gcc", "cc", "c++", "ld", "ar", "as", "ranlib", "sh", "uname"):
            found = shutil.which(tool)
            if found and tool != "cmake":
                (tools / tool).symlink_to(found)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA")}
        environment["PATH"] = str(tools)
        cmake = shutil.which("cmake")
        assert cmake
        (tools / "cmake").write_text(f'#!/bin/sh\nexec "{cmake}" "$@"\n')
        (tools / "cmake").chmod(0o755)
        done = cmake_configure(tmp_path / "build", "-DM2N_CUDA=ON", env=environment)
        if done.returncode == 0:
            pytest.skip("CMake finds a CUDA compiler without PATH")
        assert "M2N_CUDA=OFF" in done.stderr and "nvcc" in done.stderr

    @pytest.mark.nvcc
    def test_on_compiles_everything_for_a_device(self, tmp_path: Path) -> None:
        done = cmake_configure(tmp_path, "-DM2N_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
        assert done.returncode == 0, done.stderr
        commands = (tmp_path / "compile_commands.json").read_text()
        for source in (
            "transport/cuda/transport.cc",
            "transport/cuda/api.cc",
            "exchange/device/machines/cuda.cu",
            "timing.cu",
        ):
            assert source in commands

    def test_off_leaves_it_out(self, tmp_path: Path) -> None:
        done = cmake_configure(tmp_path, "-DM2N_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
        assert done.returncode == 0, done.stderr
        commands = (tmp_path / "compile_commands.json").read_text()
        assert (
            "machines/emulated.cc" in commands
            and "machines/cuda.cu" not in commands
            and "transport/cuda/" not in commands
        )
