# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the programs of tests/core/explorer, against the headers of csrc/core or copies with a mistake."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

from libraries import CXX, precompile

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests/core/explorer"
BUILD = ROOT / "build/explorer"
# -fno-builtin-memcpy and --wrap: see copies.h. Threads are left by longjmp, which a fortified library refuses.
MODEL = ["-w", "-U_FORTIFY_SOURCE", "-fno-builtin-memcpy", "-Wl,--wrap=memcpy"]
OWN = ["-std=c++20", *MODEL, "-DM2N_EXPLORER=<explore.h>"]
WHOLE = [*OWN, "-O1"]  # a mistake is found early: what compiles fast is better there
# Relacy does not compile as C++20.
RELACY = ["-std=c++17", *MODEL, "-DM2N_EXPLORER=<with_relacy.h>"]
THREADS = ["-std=c++20", "-O2", "-pthread"]


class Edit(NamedTuple):
    """One text in one file, replaced where it stands; it must stand there once."""

    file: str  # core/..., or a program
    old: str
    new: str


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=110, **options)  # type: ignore[call-overload]


@functools.cache
def build(program: str, flags: tuple[str, ...], edits: tuple[Edit, ...] = ()) -> Path:
    """Compiles a program, against copies of the files that have edits."""
    directory = BUILD / f"{program}-{zlib.crc32(repr((flags, edits)).encode()):08x}"
    copies: dict[str, str] = {}
    for edit in edits:
        origin = ROOT / "csrc" / edit.file if edit.file.startswith("core/") else PROGRAMS / edit.file
        text = copies.get(edit.file) or origin.read_text()
        assert text.count(edit.old) == 1, f"{edit.file} does not have this text once any more: {edit.old!r}"
        copies[edit.file] = text.replace(edit.old, edit.new)
    (directory / "core").mkdir(parents=True, exist_ok=True)
    for name, text in copies.items():
        (directory / name).write_text(text)
    source = directory / f"{program}.cc" if f"{program}.cc" in copies else PROGRAMS / f"{program}.cc"
    headers = re.findall(r"-DM2N_EXPLORER=<(.*)>", " ".join(flags))
    compiled = [precompile(PROGRAMS / name, flags) for name in headers]
    includes = [f"-I{directory}", *compiled, f"-I{ROOT / 'csrc'}", f"-I{PROGRAMS}"]
    done = run([CXX, *flags, *includes, source, "-o", directory / program])
    assert done.returncode == 0, done.stderr[-4000:]
    return directory / program


def explore(
    program: str, case: str, flags: list[str], edits: tuple[Edit, ...] = (), switches: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "M2N_EXPLORER_SWITCHES": str(switches)}
    return run([build(program, tuple(flags), edits), case], env=environment)
