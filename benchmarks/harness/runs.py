# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a case, again and again, and gathers their samples.

Contenders at the C++ boundary share one group of processes and alternate exchange by exchange. Each contender at the
Python boundary has a group of its own; the groups take turns, start by start.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m2n.reference_model.console.children import python_command
from m2n.reference_model.errors import InputError

from ..contenders.python import PYTHON_CONTENDERS, why_not
from . import plugins, stats
from .cases import SHARED_FOLDER, Case, require_memory
from .report import size_name

NATIVE = (
    "m2n", "memcpy", "non-temporal", "hop", "socket", "m2n-pack", "m2n-tcp", "m2n-ucx", "ucx-shm", "ucx-tcp", "mpi",
)  # fmt: skip
DIRECTIONS = ("dispatch", "combine", "roundtrip")
_MAX_ROUNDS = 20000
_SEEN = "another process has failed"  # as ranks say at both boundaries
_GRACE_S = 40.0  # beyond the seconds of a run and the longest wait: starting, proving, and slow machines

Samples = dict[tuple[str, str, str], list[np.ndarray]]  # (contender, boundary, direction): one array per process


class RunFailed(RuntimeError):
    """The ranks of a run did not end well; the text is what they said."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run for every case, and for how long a start of it lasts."""

    native: tuple[str, ...]
    python: tuple[str, ...]
    reasons: dict[str, str]  # of contenders that cannot run here
    starts: int
    seconds: float
    max_rounds: int = _MAX_ROUNDS


def known_contenders() -> list[str]:
    """The names that --baselines takes."""
    return [name for name in dict.fromkeys((*NATIVE, *PYTHON_CONTENDERS)) if name != "m2n"]


def make_plan(baselines: Sequence[str], starts: int, seconds: float, python: bool = False) -> Plan:
    """Sorts contenders by boundary and finds out which can run here.

    m2n is measured at the C++ boundary, and at the Python boundary too where somebody else is, or with `python`.

    Raises:
        InputError: an unknown name, or numbers out of range.
    """
    known = known_contenders()
    for name in baselines:
        if name not in known:
            raise InputError(f"--baselines: unknown contender {name!r}; known: {', '.join(known)}")
    if starts < 1:
        raise InputError(f"--starts: expected at least 1, got {starts}")
    if not 0 < seconds <= 600:
        raise InputError(f"--seconds: expected more than 0 and at most 600, got {seconds}")
    reasons = {name: reason for name in baselines if (reason := _why_not(name))}
    native = tuple(name for name in NATIVE if name == "m2n" or (name in baselines and name not in reasons))
    others = tuple(name for name in PYTHON_CONTENDERS if name in baselines and name not in reasons)
    return Plan(native, ("m2n", *others) if others or python else (), reasons, starts, seconds)


def _why_not(name: str) -> str:
    if name in PYTHON_CONTENDERS:
        return why_not(name)
    return plugins.find(name).reason if name in plugins.NAMES else ""


def program(name: str = "m2n_ranks") -> Path:
    """The program of the ranks at the C++ boundary, or another one, as installed with the package.

    Raises:
        InputError: it is not there.
    """
    for file in importlib.metadata.files("m2n") or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise InputError(f"the program {name} was not installed with m2n; install m2n again: pip install .")


@contextmanager
def run_folder(case: Case, contenders: Sequence[str], plan: Plan) -> Iterator[Path]:
    """A folder in memory that holds the case, and goes with all that the ranks have left in it."""
    with tempfile.TemporaryDirectory(prefix="m2n-", dir=SHARED_FOLDER) as name:
        case.write(Path(name), list(contenders), plan.seconds * len(contenders), plan.max_rounds)
        yield Path(name)


def run_processes(commands: Sequence[Sequence[str]], seconds: float) -> None:
    """Runs programs at once, to their end.

    Raises:
        RunFailed: one failed or did not end in time; the others are killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "M2N_FAULTS": ""}
    with tempfile.TemporaryFile() as errors:
        children = [
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            for command in commands
        ]  # fmt: skip
        until = time.monotonic() + seconds
        try:
            while any(child.poll() is None for child in children):
                is_failed = any(child.poll() not in (None, 0) for child in children)
                if is_failed or time.monotonic() > until:
                    break
                time.sleep(0.01)
        finally:
            is_late = any(child.poll() is None for child in children)
            if is_late:
                time.sleep(0.2)  # the others say what they have seen
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if is_late or any(child.returncode for child in children):
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            # Who failed first comes first; then those who only saw it, and what mpirun has to say.
            reasons = [line for line in lines if _SEEN not in line][:12]
            raise RunFailed("\n".join(reasons or lines[:12]) or "the ranks did not end in time")


def start_native(case: Case, plan: Plan) -> Samples:
    """One start of all contenders at the C++ boundary."""
    found = {name: plugins.find(name) for name in plan.native if name in plugins.NAMES}
    words = [f"{name}={found[name].library}" if name in found else name for name in plan.native]
    with run_folder(case, words, plan) as folder:
        command = [str(program()), str(folder)]
        if "mpi" in found:
            command = [*plugins.mpirun(case.num_processes), *command, "mpi"]
        run_processes([command], plan.seconds * len(words) + case.deadline_s + _GRACE_S)
        return _read(folder, plan.native, "cpp")


def start_python(case: Case, name: str, plan: Plan) -> Samples:
    """One start of one contender at the Python boundary."""
    with run_folder(case, [name], plan) as folder:
        if name == "mpi4py":
            ranks = python_command("m2n.benchmarks.contenders.python_ranks", folder, "mpi", name)
            command = [*plugins.mpirun(case.num_processes), *ranks]
        else:
            command = python_command("m2n.benchmarks.contenders.forked_ranks", folder, case.num_processes, name)
        run_processes([command], plan.seconds + case.deadline_s + _GRACE_S)
        return _read(folder, [name], "python")


def _read(folder: Path, contenders: Sequence[str], boundary: str) -> Samples:
    samples: Samples = defaultdict(list)
    for name in contenders:
        for direction in DIRECTIONS:
            for path in sorted(folder.glob(f"{name}.{direction}.*")):
                values = np.fromfile(path)
                if len(values):
                    samples[name, boundary, direction].append(values)
    return samples


def _start_all(case: Case, plan: Plan, starts: dict[tuple[str, str, str], list[dict[str, float]]]) -> Plan:
    """One start of everybody; the plan for the next one, without peers that have failed.

    Raises:
        RunFailed: m2n did, or a limit.
    """
    try:
        groups = [start_native(case, plan)]
    except RunFailed as error:
        peers = [name for name in plan.native if name in plugins.NAMES]
        if not peers:
            raise
        # They share their processes: which of them it was is for whoever reads the reason to say.
        plan = _without(plan, peers, error)
        groups = [start_native(case, plan)]
    for name in plan.python:
        try:
            groups.append(start_python(case, name, plan))
        except RunFailed as error:
            if name == "m2n":
                raise
            plan = _without(plan, [name], error)
    for group in groups:
        for key, processes in group.items():
            starts[key].append(stats.of_start(processes))
    return plan


def _without(plan: Plan, names: Sequence[str], error: RunFailed) -> Plan:
    text = f"failed: {next(iter(str(error).splitlines()), repr(error))}"
    native = tuple(name for name in plan.native if name not in names)
    python = tuple(name for name in plan.python if name not in names)
    return dataclasses.replace(
        plan, native=native, python=python, reasons={**plan.reasons, **dict.fromkeys(names, text)}
    )


def measure(case: Case, plan: Plan, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of results for one case: m2n first, then who could run, then who could not and why."""
    starts: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(plan.starts):
        plan = _start_all(case, plan, starts)
        tick()
    for name in plan.reasons:  # it failed in a later start
        for key in [key for key in starts if key[0] == name]:
            del starts[key]
    about = case.describe()
    payload = case.m * case.n * about["mean_bytes"]
    rows = []
    for key, values in sorted(starts.items(), key=lambda item: (item[0][1], DIRECTIONS.index(item[0][2]))):
        contender, boundary, direction = key
        ours = starts["m2n", boundary, direction]
        row = {"contender": contender, "direction": direction, "boundary": boundary, **about}
        row.update(stats.of_starts(values, payload * (2 if direction == "roundtrip" else 1)))
        row["p50_over_m2n"] = stats.ratio(ours, values, "p50_us")
        row["p99_over_m2n"] = stats.ratio(ours, values, "p99_us")
        rows.append(row)
    for name, reason in plan.reasons.items():
        boundary = "python" if name in PYTHON_CONTENDERS else "cpp"
        rows.append({"contender": name, "direction": "all", "boundary": boundary, **about, "reason": reason})
    return rows


def measure_all(work: Sequence[tuple[str, Case, Plan]]) -> list[list[dict[str, Any]]]:
    """The rows of each case, with a progress bar where somebody looks; each has words before its name there.

    Raises:
        InputError: no program, or no memory for one of them. RunFailed: with what the ranks have said.
    """
    from rich.console import Console
    from rich.progress import Progress

    program()
    for _, case, plan in work:
        require_memory(case, len(plan.native) + len(plan.python))
    rows = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=sum(plan.starts for _, _, plan in work))
        for words, case, plan in work:
            progress.update(task, description=f"{words}{case.m} x {case.n}, {size_name(case.num_bytes)}")
            rows.append(measure(case, plan, lambda: progress.advance(task)))
    return rows
