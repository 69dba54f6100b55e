# SPDX-License-Identifier: Apache-2.0
"""The native code under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from libraries import CXX, TOGETHER

pytestmark = [pytest.mark.slow, pytest.mark.under_sanitizer, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# What CMakeLists.txt gives to a build with M2N_SANITIZE.
FLAGS = ["-std=c++20", "-O1", "-g", "-fno-builtin", "-fno-omit-frame-pointer", "-pthread"]
REPORT = re.compile(r"(WARNING|ERROR): \w+Sanitizer|runtime error:|SUMMARY: \w+Sanitizer")


class Sanitizer(NamedTuple):
    name: str  # as in -fsanitize=
    library: str
    stress_s: int

    @property
    def directory(self) -> Path:
        return ROOT / "build" / f"sanitize-{self.name.replace(',', '-')}"


THREAD = Sanitizer("thread", "libtsan.so", 15)
ADDRESS = Sanitizer("address,undefined", "libasan.so", 10)
both = pytest.mark.parametrize("sanitizer", [THREAD, ADDRESS], ids=lambda sanitizer: sanitizer.name)


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=800, **options)  # type: ignore[call-overload]


def must(command: list[str | Path], **options: object) -> str:
    done = run(command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def runtime(library: str) -> str:
    path = Path(must([CXX, f"-print-file-name={library}"]).strip())
    if not path.is_absolute():
        pytest.skip(f"{CXX} has no {library}")
    return str(path)


@functools.cache
def fixed_addresses() -> tuple[str, ...]:
    """Older runtimes of ThreadSanitizer do not start where addresses are widely randomized: a prefix against it."""
    control = compile_control(THREAD)
    if "unexpected memory mapping" not in run([control, "protocol"]).stderr:
        return ()
    prefix = ("setarch", os.uname().machine, "-R")
    if run([*prefix, control, "protocol"]).returncode != 0:
        pytest.skip("ThreadSanitizer does not start: addresses are randomized, and setarch -R is not allowed")
    return prefix


@functools.cache
def compile_control(sanitizer: Sanitizer, mutate: bool = False) -> Path:
    """sanitizer_control.cc; with `mutate`, against a copy of the memory orders in which all are relaxed."""
    sanitizer.directory.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{TESTS / 'core'}"]
    if mutate:
        relaxed = sanitizer.directory / "relaxed"
        (relaxed / "core").mkdir(parents=True, exist_ok=True)
        text = (ROOT / "csrc/core/atomic.h").read_text()
        mutated = re.sub(r"memory_order_(release|acquire|seq_cst)", "memory_order_relaxed", text)
        assert mutated != text
        (relaxed / "core/atomic.h").write_text(mutated)
        includes.insert(0, f"-I{relaxed}")
    program = sanitizer.directory / ("control_mutated" if mutate else "control")
    source = TESTS / "exchange/sanitizer_control.cc"
    must([CXX, *FLAGS, f"-fsanitize={sanitizer.name}", *includes, source, "-o", program])
    return program


@functools.cache
def compile_guard_control() -> Path:
    """tests/transport/guard_control.cc, with guard pages, under AddressSanitizer."""
    build(ADDRESS)
    program = ADDRESS.directory / "guard_control"
    options = [f"-fsanitize={ADDRESS.name}", "-DM2N_GUARD_PAGES", f"-I{ROOT / 'csrc'}"]
    library = ADDRESS.directory / "libm2n_transport.a"
    must([CXX, *FLAGS, *options, TESTS / "transport/guard_control.cc", library, "-ldl", "-o", program])
    return program


@functools.cache
def build(sanitizer: Sanitizer) -> Path:
    """Builds the library with a sanitizer; a directory to import this `m2n` from."""
    directory = sanitizer.directory
    pybind11 = must([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    must(
        [
            "cmake", "-S", ROOT, "-B", directory, *generator, f"-DM2N_SANITIZE={sanitizer.name}", "-DM2N_CUDA=OFF",
            # Not Release: pybind11 would strip the names that a report needs.
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo", *TOGETHER,
            f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}",
        ]
    )  # fmt: skip
    must(["cmake", "--build", directory, "--parallel", "2", "--target", "_C"])
    stage = directory / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "m2n").mkdir(parents=True)
    for source in [*(ROOT / "m2n").glob("*.py"), *directory.glob("_C.*.so")]:
        (stage / "m2n" / source.name).symlink_to(source)
    return stage


def run_python(sanitizer: Sanitizer, tmp_path: Path, *arguments: str | Path) -> str:
    """Runs Python with the sanitized library and returns its output; fails on any report."""
    # -S: no .pth files, so that an editable installation of m2n does not come first.
    stage = build(sanitizer)
    reports = tmp_path / "reports"
    reports.mkdir()
    log = f"log_path={reports}/report"
    # The C library frees the thread-local memory of threads that have ended under a lock of its loader's, which
    # ThreadSanitizer does not see.
    suppressions = tmp_path / "suppressions"
    suppressions.write_text("race:_dl_deallocate_tls\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(stage), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]),
        # libstdc++ as well: the interceptor of `throw` is looked up when the sanitizer starts.
        "LD_PRELOAD": f"{runtime(sanitizer.library)} {runtime('libstdc++.so.6')}",
        "TSAN_OPTIONS": f"{log} halt_on_error=0 exitcode=66 second_deadlock_stack=1 suppressions={suppressions} "
        "print_suppressions=0",
        "ASAN_OPTIONS": f"{log} detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": f"{log} print_stacktrace=1",
    }
    # The interpreter itself, not a link or a script that starts it: a preload must not meet a shell.
    python = os.path.realpath(sys.executable)
    prefix = fixed_addresses() if sanitizer is THREAD else ()
    done = run([*prefix, python, "-S", *arguments], cwd=stage, env=environment)
    found = "\n".join(report.read_text()[:6000] for report in sorted(reports.iterdir())[:3])
    output = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0 and not found and not REPORT.search(output), f"{output}\n{found}"
    return done.stdout


@pytest.mark.parametrize(
    "sanitizer, mistake",
    [(THREAD, "race"), (ADDRESS, "overrun"), (ADDRESS, "overflow")],
    ids=["race", "overrun", "overflow"],
)
def test_a_mistake_is_reported(sanitizer: Sanitizer, mistake: str) -> None:
    prefix = fixed_addresses() if sanitizer is THREAD else ()
    assert REPORT.search(run([*prefix, compile_control(sanitizer), mistake]).stderr)


@both
def test_the_slot_protocol_is_clean(sanitizer: Sanitizer) -> None:
    prefix = fixed_addresses() if sanitizer is THREAD else ()
    done = run([*prefix, compile_control(sanitizer), "protocol"])
    assert done.returncode == 0 and not REPORT.search(done.stderr), done.stderr


def test_the_slot_protocol_without_its_memory_orders_is_reported() -> None:
    assert "data race" in run([*fixed_addresses(), compile_control(THREAD, mutate=True), "protocol"]).stderr


def test_guard_pages_leave_what_is_inside_alone() -> None:
    done = run([compile_guard_control(), "inside"])
    assert done.returncode == 0 and not REPORT.search(done.stderr), done.stderr


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("end", ["front", "end"])
@pytest.mark.parametrize("where", ["window", "peer"])
def test_one_byte_outside_a_mapping_is_reported(where: str, end: str, access: str) -> None:
    done = run([compile_guard_control(), where, end, access])
    assert done.returncode != 0 and "AddressSanitizer: SEGV" in done.stderr, done.stdout + done.stderr


def test_a_write_into_a_hole_between_objects_is_reported() -> None:
    done = run([compile_guard_control(), "hole"])
    assert done.returncode != 0 and "AddressSanitizer: SEGV" in done.stderr, done.stdout + done.stderr


@both
def test_the_sanitized_library_has_guard_pages_and_a_write_past_a_window_ends_it(
    sanitizer: Sanitizer, tmp_path: Path
) -> None:
    code = (
        "import ctypes, numpy as np; from m2n import _C, Shape;"
        "shape = Shape(hidden=8, num_experts=4, top_k=2, max_tokens=4, dispatch_dtype='float32');"
        "window = np.from_dlpack(_C.ExpertComm(shape._native(), 0, 2, 'shm', [0, 1]).window());"
        "print('found', window.sum(), flush=True);"
        "ctypes.memset(window.ctypes.data + window.nbytes, 1, 1)"
    )
    with pytest.raises(AssertionError, match=r"(?s)found 0\.0.*Sanitizer: SEGV"):
        run_python(sanitizer, tmp_path, "-c", code)


@both
def test_the_sanitized_library_is_the_one_that_runs(sanitizer: Sanitizer, tmp_path: Path) -> None:
    code = "import m2n, m2n._C; print(m2n._C.sanitizer, m2n._C.__file__)"
    name, path = run_python(sanitizer, tmp_path, "-c", code).split(maxsplit=1)
    assert name == sanitizer.name and Path(path.strip()).is_relative_to(sanitizer.directory)


@both
def test_thread_ranks_under_stress(sanitizer: Sanitizer, tmp_path: Path) -> None:
    output = run_python(sanitizer, tmp_path, TESTS / "support/sanitize_body.py", str(sanitizer.stress_s))
    assert f"sanitizer {sanitizer.name}:" in output


@both
def test_marked_tests_of_the_suite(sanitizer: Sanitizer, tmp_path: Path) -> None:
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.sanitize\n" in path.read_text()]
    assert files, "no test is marked with sanitize"
    options = ["-m", "sanitize", "-q", "--timeout=600", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    output = run_python(
        sanitizer, tmp_path, "-m", "pytest", f"--config-file={ROOT / 'pyproject.toml'}", *options, *files
    )
    assert re.search(r"\d+ passed", output) and "failed" not in output, output
