# SPDX-License-Identifier: Apache-2.0
"""Looks at all states of a case of a model in tests/core/promela, with Spin."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "core/promela"
CC = os.environ.get("CC", "gcc")
DEADLOCK = "invalid end state"


def must(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=110)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}: expected exit status 0, got {done.returncode}\n{said[-4000:]}"
    return said


def verify(case: str, directory: Path, cycles: bool = False) -> str:
    """What Spin's verifier says of a case, `<model> <definitions>`: of its states, or of its cycles."""
    model, *definitions = case.split()
    must(["spin", "-a", *(f"-D{name}" for name in definitions), str(MODELS / f"{model}.pml")], directory)
    # -O0: compiling takes longer than most of the runs, and six times as long with -O2.
    looks_for = "-DNP" if cycles else "-DSAFETY"
    must([CC, "-O0", "-w", "-DMEMLIM=2000", looks_for, "-o", "pan", "pan.c"], directory)
    said = must(["./pan", "-m20000", *(["-l"] if cycles else [])], directory)
    summary = re.search(r"(errors: \d+)\s+(\d+) states, stored", said)
    assert summary, f"{case}: expected a summary of the search, got\n{said[-4000:]}"
    print(f"{case}: {summary[1]}, {summary[2]} states")
    return said


def holds(case: str, directory: Path, cycles: bool = False) -> None:
    said = verify(case, directory, cycles)
    trail = replay(case, directory) if (directory / trail_name(case)).exists() else ""
    assert "errors: 0" in said, f"{case}: a run that must not be:\n{said[:1000]}\n{trail}"
    for limit in ("Search not completed", "max search depth too small", "out of memory", "truncated"):
        assert limit not in said, f"{case}: expected a search of all states; make the case smaller\n{said[-2000:]}"


def finds(case: str, expected: str, directory: Path, cycles: bool = False) -> None:
    said = verify(case, directory, cycles)
    assert "errors: 1" in said and re.search(expected, said), f"{case}: expected to find {expected}\n{said[:2000]}"
    assert (directory / trail_name(case)).exists(), f"{case}: expected a trail\n{said[:2000]}"


def trail_name(case: str) -> str:
    return f"{case.split()[0]}.pml.trail"


def replay(case: str, directory: Path) -> str:
    """The steps of the run that Spin found, the last ones."""
    model, *definitions = case.split()
    names = [f"-D{name}" for name in definitions]
    command = ["spin", "-p", "-k", trail_name(case), *names, str(MODELS / f"{model}.pml")]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
    return "\n".join(done.stdout.splitlines()[-120:])
