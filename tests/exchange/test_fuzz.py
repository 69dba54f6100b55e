# SPDX-License-Identifier: Apache-2.0
"""libFuzzer on what peers of either role write and on routes (fuzz/*.cc), each for some seconds with a new seed.

A long campaign: M2N_FUZZ_SECONDS=3600 pytest tests/exchange/test_fuzz.py -s. A finding is printed with its stack and
its input.
"""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from tiers import find_clang

pytestmark = [pytest.mark.slow, pytest.mark.fuzz, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fuzz"
SECONDS = int(os.environ.get("M2N_FUZZ_SECONDS", "5"))
INSTRUMENT = "address,undefined"
FLAGS = [
    "-std=c++20", "-O1", "-gline-tables-only", "-fno-omit-frame-pointer", "-ffp-contract=off", "-pthread",
    "-DM2N_GUARD_PAGES", "-DM2N_HAS_CUDA=0", "-D_GLIBCXX_ASSERTIONS", "-fno-sanitize-recover=undefined",
]  # fmt: skip
# No leaks: worlds live until the process ends. Fake stacks double the price of an exception, of which there are many.
OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=32"
TARGETS = ("fuzz_expert", "fuzz_attention", "fuzz_route")


class Mutation(NamedTuple):
    """A check that is taken out of a header, to see that the fuzzer notices."""

    target: str
    header: str  # below csrc
    check: str  # a pattern; found exactly once
    instead: str = ""


WRONG = (
    Mutation("fuzz_expert", "exchange/bodies/inbox.h", r"  if \(signal_rows\(signal\) > max_tokens\) return [^;]*;\n"),
    Mutation("fuzz_expert", "exchange/bodies/dispatch.h", r"  if \(id < 0 \|\| [^;]*num_experts\) return [^;]*;\n"),
    Mutation(
        "fuzz_attention",
        "core/slot.h",
        r"seq == last_seq \+ 1u \? Arrival::kNext : Arrival::kViolation",
        "Arrival::kNext",
    ),
    Mutation("fuzz_route", "exchange/rows/route.h", r"      if \(ids\[j\] == ids\[k\]\) return [^;]*;\n"),
)


def clang() -> str:
    """The C++ compiler with libFuzzer; conftest.why_no_fuzzer has looked for it."""
    found = find_clang()
    assert found
    return found


def environment() -> dict[str, str]:
    """Stacks have names where there is a symbolizer: clang's own, or that of binutils."""
    beside_clang = Path(os.path.realpath(clang())).with_name("llvm-symbolizer")
    symbolizer = beside_clang if beside_clang.exists() else shutil.which("addr2line")
    named = {"ASAN_SYMBOLIZER_PATH": str(symbolizer)} if symbolizer else {}
    return {**os.environ, "ASAN_OPTIONS": OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1", **named}


def must(command: list[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def compile_objects(sources: list[Path], directory: Path, includes: list[str]) -> list[Path]:
    """Objects of some sources, as many at a time as there are cores."""
    directory.mkdir(parents=True, exist_ok=True)
    objects = [directory / f"{source.stem}.o" for source in sources]
    commands = [
        [clang(), *FLAGS, f"-fsanitize=fuzzer-no-link,{INSTRUMENT}", *includes, "-MMD", "-c", source, "-o", target]
        for source, target in zip(sources, objects)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(must, commands))
    return objects


def includes(*more: Path) -> list[str]:
    return [f"-I{path}" for path in (*more, ROOT / "csrc", ROOT / "tests/exchange/fuzz")]


@functools.cache
def build() -> dict[str, Path]:
    """All targets, from csrc itself."""
    # What every build has: the sources that CMake adds only with CUDA come by target_sources().
    cmake = "".join(re.findall(r"add_library\(m2n_\w+ STATIC[^)]*\)", (ROOT / "CMakeLists.txt").read_text()))
    # Nor what runs the verbs on a device or over a network, which no target does: it takes long to compile.
    names = re.findall(r"csrc/(?!exchange/device/|transport/(?:network|tcp|ucx)/)[\w/]+\.cc", cmake)
    library = [ROOT / path for path in (*names, "tests/transport/no_network.cc")]
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    # Those of a folder together take a third as long.
    folders = sorted({folder_of(path) for path in library})
    for folder in folders:
        lines = [f'#include "{path}"\n' for path in library if folder_of(path) == folder]
        (BUILD / f"{folder}.cc").write_text("".join(lines))
    sources = [BUILD / f"{folder}.cc" for folder in folders]
    sources += [ROOT / f"tests/exchange/fuzz/{target}.cc" for target in TARGETS]
    objects = compile_objects(sources, BUILD / "objects", includes())
    for target, main in zip(TARGETS, objects[len(folders) :]):
        link(main, objects[: len(folders)], BUILD / target)
    return {target: BUILD / target for target in TARGETS}


def folder_of(path: Path) -> str:
    """exchange_host for all below csrc/exchange/host; transport for csrc/transport and what tests put beside it."""
    names = path.relative_to(ROOT).parts[1:-1]
    return "_".join(names[: 1 if names[0] == "transport" else 2])


def link(main: Path, library: list[Path], program: Path) -> None:
    must([clang(), f"-fsanitize=fuzzer,{INSTRUMENT}", "-pthread", main, *library, "-o", program])


def build_wrong(mutation: Mutation) -> Path:
    """A target built against a copy of a header that lacks one check."""
    build()
    directory = BUILD / f"wrong-{WRONG.index(mutation)}"
    text = (ROOT / "csrc" / mutation.header).read_text()
    wrong, count = re.subn(mutation.check, mutation.instead, text)
    assert count == 1, f"{mutation.header} holds {mutation.check!r} {count} times; the control needs the check's text"
    header = directory / mutation.header
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(wrong)
    # What includes the header, directly or not, is compiled again; the rest is the library as it is.
    right = re.escape(str(ROOT / "csrc" / mutation.header).replace(" ", "\\ "))  # as compilers write dependencies
    again, rest = [ROOT / f"tests/exchange/fuzz/{mutation.target}.cc"], []
    for path in (BUILD / "objects").glob("*.o"):
        if path.stem in TARGETS:
            continue
        includes_it = re.search(rf"{right}\s", path.with_suffix(".d").read_text()) is not None
        (again if includes_it else rest).append(BUILD / f"{path.stem}.cc" if includes_it else path)
    objects = compile_objects(again, directory / "objects", includes(directory))
    program = directory / mutation.target
    link(objects[0], [*objects[1:], *rest], program)
    return program


def fuzz(program: Path, directory: Path, seconds: int) -> tuple[str, bool]:
    """Runs a target; its output, with the input of a finding, and whether there was one."""
    corpus = directory / "corpus"
    corpus.mkdir()
    for i in range(16):  # nothing that is good or bad by design: long enough to begin with
        (corpus / str(i)).write_bytes(random.Random(i).randbytes(8 << i % 5))
    seed = random.SystemRandom().randrange(1, 2**31)
    options = [
        f"-seed={seed}", f"-max_total_time={seconds}", "-max_len=256", "-len_control=0", "-timeout=5",
        "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={directory}/",
    ]  # fmt: skip
    command = [str(program), *options, str(corpus)]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=seconds + 120)
    lines = done.stderr.decode(errors="replace").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#") or "DONE" in line)[-12000:]
    text = f"seed {seed}, {seconds} s: {' '.join(command)}\n{text}"
    for finding in sorted(directory.glob("*-*")):
        data = finding.read_bytes()
        text += f"\n{finding.name}: base64 {base64.b64encode(data).decode()}\n"
    return text, done.returncode != 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.timeout(SECONDS + 600)
def test_nothing_that_a_peer_or_a_caller_writes_breaks_it(target: str, tmp_path: Path) -> None:
    text, is_found = fuzz(build()[target], tmp_path, SECONDS)
    assert not is_found, text
    num_runs = int(re.search(r"number_of_executed_units: (\d+)", text)[1])
    assert num_runs > 100, text
    print("\n".join([text.splitlines()[0], *re.findall(r"^#.*DONE.*$|^stat::.*$", text, re.MULTILINE)]))


@pytest.mark.parametrize("mutation", WRONG, ids=lambda mutation: f"{mutation.header}-{WRONG.index(mutation)}")
def test_a_wrong_check_is_found(mutation: Mutation, tmp_path: Path) -> None:
    # It ends with the finding, mostly within 10 s; a busy machine needs more.
    text, is_found = fuzz(build_wrong(mutation), tmp_path, 150)
    assert is_found and "base64" in text, text
    assert re.search(r"FUZZ: does not hold|ERROR: AddressSanitizer|runtime error:|libFuzzer: out-of-memory", text), text
    print(text[-1500:])
