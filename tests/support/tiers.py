# SPDX-License-Identifier: Apache-2.0
"""The tiers of the tests: what each needs, and the screen at the end of a run that says what ran and what did not."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from libraries import CXX

_APT = re.compile(r"apt-get install -y ([^)]+)\)")  # in the words that say why a tier cannot run
_MOST_REASONS = 8  # one screen
_WIDEST = 140


@functools.cache
def why_no_cuda_device() -> str | None:
    """Why tests with the marker `cuda` cannot run here; None when they can."""
    try:
        from m2n import _C

        if reason := _C.why_no_cuda():
            return reason
        import torch  # only where there is a GPU: the sanitizers run without it
    except ImportError as error:
        return f"cannot be looked for: {error}"
    return None if torch.cuda.is_available() else "torch was built without CUDA"


def why_no_cuda_compiler() -> str | None:
    """Why tests with the marker `nvcc` cannot run here; None when they can."""
    return None if shutil.which("nvcc") else "no nvcc on PATH"


@functools.cache
def why_no_ucx() -> str | None:
    """Why tests with the marker `ucx` cannot run here; None when they can."""
    import m2n
    from m2n import _C

    if _C.sanitizer:
        return "sanitizers do not know what UCX does"
    features = m2n.features()
    return None if features["ucx"] else features["ucx_words"]


def why_no_hosts() -> str | None:
    """Why tests with the marker `two_hosts` cannot run here; None when they can."""
    from m2n import _C

    if _C.sanitizer:
        return "the sanitizers' library has no benchmarks beside it"
    from m2n.benchmarks.harness import hosts

    return hosts.why_no_hosts()


def find_clang() -> str | None:
    """clang++, whatever version its name carries."""
    names = ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1)))
    return next((path for name in names if (path := shutil.which(name))), None)


def why_no_fuzzer() -> str | None:
    """Why tests with the marker `fuzz` cannot run here; None when they can."""
    compiler = find_clang()
    library = compiler and next(Path(os.path.realpath(compiler)).parents[1].rglob("libclang_rt.fuzzer-*.a"), None)
    return None if library else "no clang++ with libFuzzer (apt-get install -y clang-16 libclang-rt-16-dev)"


def why_no_explorer() -> str | None:
    """Why tests with the marker `explorer` cannot run here; None when they can."""
    return None if shutil.which(CXX) else "no C++ compiler (apt-get install -y g++)"


needs_compiler = pytest.mark.skipif(why_no_explorer() is not None, reason=why_no_explorer() or "")


def why_no_relacy() -> str | None:
    """Why tests with the marker `relacy` cannot run here; None when they can."""
    is_here = Path("/usr/include/relacy/relacy.hpp").exists()
    return why_no_explorer() if is_here else "no relacy/relacy.hpp (apt-get install -y relacy-dev)"


def why_no_model_checker() -> str | None:
    """Why tests with the marker `promela` cannot run here; None when they can."""
    if not shutil.which("spin"):
        return "no spin (apt-get install -y spin)"
    return None if shutil.which(os.environ.get("CC", "gcc")) else "no C compiler for spin (apt-get install -y spin gcc)"


def why_no_valgrind() -> str | None:
    """Why tests with the marker `valgrind` cannot run here; None when they can."""
    return why_no_explorer() if shutil.which("valgrind") else "no valgrind (apt-get install -y valgrind)"


# (tier, the marker that makes a test part of it, why it cannot run here). A test counts for every tier it is in.
TIERS = (
    ("fast", None, lambda: None),
    ("slow", "slow", lambda: None),
    ("sanitizers", "under_sanitizer", lambda: None),
    ("fuzz", "fuzz", why_no_fuzzer),
    ("explorer", "explorer", why_no_explorer),
    ("relacy", "relacy", why_no_relacy),
    ("model", "promela", why_no_model_checker),
    ("instructions", "valgrind", why_no_valgrind),
    ("UCX", "ucx", why_no_ucx),
    ("CUDA compiler", "nvcc", why_no_cuda_compiler),
    ("CUDA device", "cuda", why_no_cuda_device),
    ("two hosts", "two_hosts", why_no_hosts),
)


def tiers_of(keywords: Mapping[str, object]) -> list[str]:
    tiers = [tier for tier, marker, _ in TIERS if marker and marker in keywords]
    return tiers if "slow" in tiers else ["fast", *tiers]


class TierReport:
    """Counts outcomes and seconds per tier, as tests run, here or in the workers of pytest-xdist."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {tier: Counter() for tier, _, _ in TIERS}
        self.seconds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tiers = tiers_of(report.keywords)
        self.seconds.update(dict.fromkeys(tiers, report.duration))
        is_error = report.failed and report.when != "call"
        if report.when == "call" or report.skipped or is_error:
            for tier in tiers:
                self.outcomes[tier]["error" if is_error else report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self._did_not_run(report.longrepr[2])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._did_not_run(report.longrepr[2])

    def _did_not_run(self, words: str) -> None:
        self.reasons[words.removeprefix("Skipped: ").splitlines()[0]] += 1

    def lines(self) -> Iterator[str]:
        """A line for each tier, then why tests did not run, then what would let them."""
        for tier, _, why in TIERS:
            outcomes = self.outcomes[tier]
            num_run = outcomes.total() - outcomes["skipped"]
            if num_run:
                counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
                yield f"{tier:14} ran {num_run} in {self.seconds[tier]:.0f} s: {counts}"
            else:
                yield f"{tier:14} NOT RUN: {why() or 'not chosen'}"
        for reason, count in self.reasons.most_common(_MOST_REASONS):
            yield f"{count} did not run: {reason[:_WIDEST]}"
        if others := self.reasons.total() - sum(count for _, count in self.reasons.most_common(_MOST_REASONS)):
            yield f"{others} did not run for other reasons (pytest -rs names them)"
        missing = " ".join(reason for _, _, why in TIERS if (reason := why()))
        if packages := sorted({name for names in _APT.findall(missing) for name in names.split()}):
            yield f"More would run here after: apt-get install -y {' '.join(packages)}"
