# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: one thread for torch, nothing left behind, and a summary that names each tier."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers import TIERS, TierReport

try:
    import hypothesis

    # Time decides no test: a busy machine makes examples slowly.
    hypothesis.settings.register_profile("m2n", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("m2n")
except ImportError:  # the tests that need it say so
    pass
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
    terminalreporter.section("what ran, and what did not")
    for line in tier_report.lines():
        terminalreporter.line(line)
    if leftovers is None:
        terminalreporter.line("leftovers      NOT LOOKED FOR: psutil is not installed")
    elif leftovers.found:
        terminalreporter.section("LEFT BEHIND by the tests (the run has failed)", red=True, bold=True)
        for thing in leftovers.found:
            terminalreporter.line(thing, red=True)
