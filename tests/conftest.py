# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: one thread for torch, nothing left behind, and a summary that names each tier."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from libraries import CXX

try:
    import psutil
except ImportError:  # without it nobody can look for leftovers; the summary says so
    psutil = None

# Inherited by every process that a test starts, at any depth: that is how its leftovers are found.
SESSION_VARIABLE = "M2N_TEST_SESSION"
SESSION = secrets.token_hex(8)
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 5.0
# Set: each failure is told at once.
TELL_VARIABLE = "M2N_TEST_TELL"
# Files that take longest.
LONGEST_FIRST = (
    "test_sanitizers", "test_two_hosts", "test_explorer", "test_fuzz", "test_promela", "test_exchange",
    "test_torch_ops", "test_cmake_package", "test_kernels", "test_disaggregated", "test_generate", "test_nccl_put",
)  # fmt: skip

# Two cores are shared by all ranks of a test: more threads per rank only make it slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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


# (tier, the marker that makes a test part of it, why it cannot run here). A test counts for every tier it is in.
TIERS = (
    ("fast", None, lambda: None),
    ("slow", "slow", lambda: None),
    ("sanitizers", "under_sanitizer", lambda: None),
    ("fuzz", "fuzz", why_no_fuzzer),
    ("explorer", "explorer", why_no_explorer),
    ("relacy", "relacy", why_no_relacy),
    ("model", "promela", why_no_model_checker),
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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tiers = tiers_of(report.keywords)
        self.seconds.update(dict.fromkeys(tiers, report.duration))
        is_error = report.failed and report.when != "call"
        if report.when == "call" or report.skipped or is_error:
            for tier in tiers:
                self.outcomes[tier]["error" if is_error else report.outcome] += 1

    def line(self, tier: str) -> str:
        """What became of a tier, in words."""
        reason = next(why() for name, _, why in TIERS if name == tier)
        outcomes = self.outcomes[tier]
        num_run = outcomes.total() - outcomes["skipped"]
        if num_run:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            return f"{tier:14} ran {num_run} in {self.seconds[tier]:.0f} s: {counts}"
        return f"{tier:14} NOT RUN: {reason or 'not chosen'}"


class Leftovers:
    """Finds what the tests left behind: processes, and names in shared memory."""

    def __init__(self) -> None:
        self.names_before = self._names()
        self.found: list[str] = []

    @staticmethod
    def _names() -> set[str]:
        return {entry.name for entry in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()

    @staticmethod
    def processes() -> list[psutil.Process]:
        """Living processes that descend from this session, other than Python's own helper."""
        # A forked child shows the variables of its parent's start; an orphan is nobody's child: look for both.
        children = psutil.Process().children(recursive=True)
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process in children or process.environ().get(SESSION_VARIABLE) == SESSION
                if not is_ours or process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if "resource_tracker" not in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def names(self) -> list[str]:
        """New names in shared memory that are our user's and that no process of somebody else has mapped."""
        left = []
        for name in sorted(self._names() - self.names_before):
            path = SHARED_MEMORY / name
            try:
                if path.stat().st_uid == os.getuid() and not _is_mapped_elsewhere(str(path)):
                    left.append(str(path))
            except FileNotFoundError:
                continue
        return left

    def names_that_stay(self) -> list[str]:
        """Those that are left after a while: tests that run beside this one come and go."""
        deadline = time.monotonic() + GRACE_S
        while (left := self.names()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def look(self) -> list[str]:
        """Waits a little for what is ending, then says what is left, and ends it."""
        deadline = time.monotonic() + GRACE_S
        while (self.processes() or self.names()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self.processes():
            with process.oneshot():
                self.found.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        self.found += [f"shared memory {name}" for name in self.names()]
        return self.found


def _is_mapped_elsewhere(path: str) -> bool:
    for process in psutil.process_iter():
        try:
            if process.environ().get(SESSION_VARIABLE) == SESSION:
                continue
            if any(mapping.path == path for mapping in process.memory_maps()):
                return True
        except psutil.Error:
            continue
    return False


tier_report = TierReport()
leftovers: Leftovers | None = None


class Teller:
    """Tells each failure at once: a run that is cut off has no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write(f"\n{report.nodeid}\n{report.longreprtext[-4000:]}\n", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    global leftovers
    config.pluginmanager.register(tier_report, "m2n-tiers")
    if TELL_VARIABLE in os.environ:
        config.pluginmanager.register(Teller(config))
    os.environ[SESSION_VARIABLE] = SESSION
    if psutil is not None:
        leftovers = Leftovers()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what breaks often is told early. Of two workers none is left with a long file in the end. Tests
    that cannot run here are skipped with the reason."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, place.get(item.path.stem, len(place))))
    for _, marker, why in TIERS:
        reason = why() if marker else None
        for item in items if reason else []:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    """What is said once a process is said once a test."""
    notes = sys.modules.get("m2n.notes")
    if notes is not None:
        notes.clear()


def over(*transports: str) -> list[pytest.MarkDecorator]:
    """As a module's pytestmark: its tests run over each of these transports."""
    params = [pytest.param(name, marks=[pytest.mark.ucx] * (name == "ucx")) for name in transports]
    return [pytest.mark.usefixtures("transport"), pytest.mark.parametrize("transport", params, indirect=True)]


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ranks of `bodies`, in this process and in those that a test starts, use the transport of this name."""
    import bodies

    monkeypatch.setenv(bodies.TRANSPORT_VARIABLE, request.param)
    monkeypatch.setattr(bodies, "NUMPY", bodies.config_of(request.param))
    return request.param


@pytest.fixture(autouse=True)
def _warm_gpu(request: pytest.FixtureRequest) -> None:
    """Before the first test on a GPU everything has run there once, with nothing that waits beside it."""
    if request.node.get_closest_marker("cuda") and not _is_warm:
        import virtual_ranks

        _is_warm.append(True)
        virtual_ranks.main("cuda:0", 1)


_is_warm: list[bool] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if leftovers is not None and leftovers.look():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("tiers")
    for tier, _, _ in TIERS:
        terminalreporter.line(tier_report.line(tier))
    if leftovers is None:
        terminalreporter.line("leftovers      NOT LOOKED FOR: psutil is not installed")
    elif leftovers.found:
        terminalreporter.section("LEFT BEHIND by the tests (the run has failed)", red=True, bold=True)
        for thing in leftovers.found:
            terminalreporter.line(thing, red=True)
