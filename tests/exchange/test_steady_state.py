# SPDX-License-Identifier: Apache-2.0
"""Once everything is warm the verbs allocate nothing, and ask the system for nothing but yields, sleeps and wakes.

steady_state.cc runs the four verbs at the C++ boundary, counts in malloc, and is traced by its own parent.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from libraries import CXX, build_libraries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/steady-state"
FLAGS = ["-std=c++20", "-O2", "-g1", "-w", "-ffp-contract=off", "-DM2N_HAS_CUDA=0", f"-I{ROOT / 'csrc'}"]
KINDS = [("expert", "pairs"), ("expert", "reduced"), ("attention", "pairs")]
CANNOT_TRACE = 3

Counts = dict[tuple[str, str], dict[str, int]]  # (phase, verb): what, how often


def must(command: list[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"


@functools.cache
def build(old: str = "", new: str = "") -> Path:
    """The program; with `old` against a copy of batch.cc in which that text is another one."""
    BUILD.mkdir(parents=True, exist_ok=True)
    directory = build_libraries()
    sources = [ROOT / "tests/exchange/steady_state.cc"]
    if old:
        text = (ROOT / "csrc/exchange/host/batch.cc").read_text()
        assert text.count(old) == 1, f"batch.cc does not have this text once any more: {old!r}"
        sources.append(BUILD / "edited_batch.cc")
        sources[-1].write_text(text.replace(old, new))
    program = BUILD / sources[-1].stem
    libraries = [directory / f"libm2n_{name}.a" for name in ("exchange", "transport")]
    # What comes first counts: an edited file stands in the place of the library's.
    libraries = ["-Wl,--allow-multiple-definition", *libraries]
    must([CXX, *FLAGS, *sources, *libraries, "-rdynamic", "-pthread", "-ldl", "-o", program])
    return program


def count(program: Path, *arguments: str) -> tuple[Counts, str]:
    """What was counted, and where the first allocations came from."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=100)
    if done.returncode == CANNOT_TRACE:
        pytest.skip("ptrace is not allowed here: system calls cannot be counted")
    assert done.returncode == 0, done.stderr[-4000:]
    counts: Counts = defaultdict(dict)
    for line in done.stdout.splitlines():
        phase, verb, what, number = line.split()
        counts[phase, verb][what] = int(number)
    places = re.findall(r"\(\+(0x[0-9a-f]+)\)", done.stderr)
    command = ["addr2line", "--demangle", "--functions", f"--exe={program}", *places]
    names = subprocess.run(command, capture_output=True, text=True) if places else None
    return counts, done.stderr + (names.stdout if names else "")


@pytest.mark.essential
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_nothing_is_allocated(kind: tuple[str, str]) -> None:
    counts, traces = count(build(), *kind)
    per_round = {key: found["allocations"] / 1000 for key, found in counts.items() if "allocations" in found}
    assert len(per_round) == 8
    assert not any(per_round.values()), f"allocations per round: {per_round}\n{traces[:6000]}"


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_system_calls_are_yields_sleeps_and_wakes(kind: tuple[str, str]) -> None:
    """A verb that waits for nothing makes none. A sending verb wakes a peer that sleeps, and does nothing else."""
    counts, _ = count(build(), *kind)
    has_slow_clock = bool(counts["alone", "clock"])
    calls = {key: set(found) - {"allocations"} for key, found in counts.items()}
    if has_slow_clock:
        calls = {key: found - {"clock_gettime"} for key, found in calls.items()}
    for verb in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
        assert not calls["alone", verb], counts
    for verb in ("dispatch_send", "combine_send"):
        assert calls["apart", verb] <= {"futex"}, counts
        assert counts["apart", verb].get("futex", 0) < 1000, counts
    for verb in ("dispatch_recv", "combine_recv"):
        assert calls["apart", verb] <= {"sched_yield", "futex"}, counts
    # The late rounds did put the other side to sleep: wakes are seen, if there are any.
    assert "futex" in calls["apart", "combine_recv"] and "futex" in calls["apart", "combine_send"], counts


def test_a_verb_that_does_more_is_found() -> None:
    counts, traces = count(build(), "expert", "pairs", "mistake")
    for phase in ("alone", "apart"):
        found = counts[phase, "combine_send"]
        assert found["allocations"] >= 900
        assert any(name.startswith("syscall_") and number >= 900 for name, number in found.items()), found
    assert "an allocation in combine_send" in traces


def test_batches_that_are_not_used_again_are_found() -> None:
    old = "!is_thread_over && spare.batches.size() < kMaxSpare"
    counts, traces = count(build(old, "false"), "expert", "pairs")
    assert counts["alone", "dispatch_recv"]["allocations"] >= 1000
    assert "ExpertComm" in traces
