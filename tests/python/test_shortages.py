# SPDX-License-Identifier: Apache-2.0
"""Memory that there is not is refused with its sizes, before it is touched: nothing is killed for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import SUPPORT

import m2n
from m2n import _C

MB = 1 << 20


def run(name: str, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    """What the program of tests/support/shortages.py prints; it must end well."""
    command = [*prefix, sys.executable, "shortages.py", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=SUPPORT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout.strip()


# What the kernel tells of memory, as files


class Proc:
    """A /proc of the test's own, and beside it a hierarchy of cgroups."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.top = folder / "proc", folder / "control groups"
        (self.folder / "self").mkdir(parents=True)
        self.top.mkdir()
        self.has(machine=10**9)

    def has(self, machine: int, available: int | None = None) -> None:
        free = machine if available is None else available
        (self.folder / "meminfo").write_text(f"MemTotal: {machine} kB\nMemFree: 1 kB\nMemAvailable: {free} kB\n")

    def is_in(self, cgroup: str, mounted: str, root: str = "/") -> None:
        (self.folder / "self/cgroup").write_text(cgroup)
        at = str(self.top).replace(" ", "\\040")
        lines = ["22 1 254:1 / / rw,relatime - ext4 /dev/root rw", f"35 31 0:32 {root} {at} rw shared:9 - {mounted}"]
        (self.folder / "self/mountinfo").write_text("\n".join(lines) + "\n")

    def v1(self, path: str = "/a/b", root: str = "/") -> None:
        cgroup = f"9:name=systemd:/other\n4:cpu,memory:{path}\n0::/third\n"
        self.is_in(cgroup, "cgroup cgroup rw,cpu,memory", root)

    def v2(self, path: str = "/a/b", root: str = "/") -> None:
        self.is_in(f"0::{path}\n", "cgroup2 cgroup2 rw,nsdelegate", root)

    def folder_of(self, path: str) -> Path:
        folder = self.top / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def v1_limit(self, path: str, limit: int, held: int, cache: int = 0) -> None:
        folder = self.folder_of(path)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{held}\n")
        half = cache // 2
        (folder / "memory.stat").write_text(
            f"active_file 7\ninactive_file 7\ntotal_active_file {half}\ntotal_inactive_file {cache - half}\n"
        )

    def v2_limit(self, path: str, limit: int | str, held: int, cache: int = 0) -> None:
        folder = self.folder_of(path)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{held}\n")
        half = cache // 2
        (folder / "memory.stat").write_text(
            f"anon 5\nfile {held}\nshmem {held}\nactive_file {half}\ninactive_file {cache - half}\n"
        )

    def refusal(self, num_bytes: int) -> str:
        try:
            _C.require_memory("a window", num_bytes, str(self.folder))
        except m2n.SetupError as error:
            return str(error)
        return ""


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_the_limit_of_a_v1_cgroup_counts(proc: Proc) -> None:
    proc.v1()
    proc.v1_limit("/a/b", limit=400 * MB, held=100 * MB)
    assert proc.refusal(290 * MB) == ""
    text = proc.refusal(301 * MB)
    assert all(part in text for part in ("a window", str(301 * MB), str(400 * MB), str(100 * MB), "/a/b")), text


def test_the_limit_of_a_v2_cgroup_counts(proc: Proc) -> None:
    proc.v2()
    proc.v2_limit("/a/b", limit=400 * MB, held=100 * MB)
    assert proc.refusal(290 * MB) == ""
    text = proc.refusal(301 * MB)
    assert all(part in text for part in ("memory.max", str(301 * MB), str(400 * MB), str(100 * MB))), text


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_limits_of_all_cgroups_above_count(proc: Proc, version: str) -> None:
    getattr(proc, version)("/a/b/c")
    limit: Callable[..., None] = getattr(proc, f"{version}_limit")
    limit("/a/b/c", limit=1000 * MB, held=0)
    limit("/a", limit=100 * MB, held=60 * MB)  # and /a/b has none
    assert proc.refusal(30 * MB) == ""
    assert f"{proc.top}/a may have" in proc.refusal(50 * MB)
    limit("", limit=80 * MB, held=60 * MB)  # the mounted one
    assert f"{proc.top} may have" in proc.refusal(30 * MB)


def test_a_cgroup_without_a_limit_refuses_nothing(proc: Proc) -> None:
    proc.v2()
    proc.v2_limit("/a/b", limit="max", held=100 * MB)
    assert proc.refusal(10_000 * MB) == ""
    proc.v1()
    proc.v1_limit("/a/b", limit=9223372036854771712, held=100 * MB)
    assert proc.refusal(10_000 * MB) == ""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_the_page_cache_gives_back_does_not_count_as_held(proc: Proc, version: str) -> None:
    getattr(proc, version)()
    limit: Callable[..., None] = getattr(proc, f"{version}_limit")
    limit("/a/b", limit=400 * MB, held=390 * MB, cache=200 * MB)
    assert proc.refusal(190 * MB) == ""
    assert str(190 * MB) in proc.refusal(215 * MB)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_sees_its_own_cgroup_at_the_top(proc: Proc, version: str) -> None:
    """Of the hierarchy a part is mounted: this process's cgroup, or one above it."""
    limit: Callable[..., None] = getattr(proc, f"{version}_limit")
    limit("", limit=400 * MB, held=100 * MB)
    for path, root in [("/pods/one", "/pods/one"), ("/pods/one", "/pods"), ("/", "/"), ("/../..", "/")]:
        getattr(proc, version)(path, root)
        assert proc.refusal(290 * MB) == "" and proc.refusal(310 * MB) != "", (path, root)


def test_the_memory_of_the_machine_counts(proc: Proc) -> None:
    proc.has(machine=1000 * 1024, available=300 * 1024)
    assert proc.refusal(290 * MB) == ""
    text = proc.refusal(301 * MB)
    assert all(part in text for part in ("this machine", str(301 * MB), str(1000 * MB), str(700 * MB))), text


def test_a_machine_that_tells_nothing_refuses_nothing(proc: Proc) -> None:
    (proc.folder / "meminfo").unlink()
    assert proc.refusal(1 << 50) == ""


def test_this_machine_refuses_more_than_it_has(record_property: Callable[[str, object], None]) -> None:
    began = time.perf_counter()
    _C.require_memory("a window", MB)
    record_property("require_memory_us", round((time.perf_counter() - began) * 1e6))
    with pytest.raises(m2n.SetupError, match="cannot allocate a window: 1125899906842624 bytes are needed, and"):
        _C.require_memory("a window", 1 << 50)


# Comms that lack something


def test_a_comm_whose_files_may_not_be_so_large_is_refused() -> None:
    text = run("with_small_files", MB)
    assert text.startswith("SetupError: memory: cannot allocate the memory that one peer writes: 67108864 bytes"), text
    assert "1048576 bytes" in text and "RLIMIT_FSIZE" in text


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 200 MB below this process's; the tests that ask for it run where one can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    top = "/sys/fs/cgroup/memory"
    if path is None:
        top, path = "/sys/fs/cgroup", next((path for _, names, path in lines if names == ""), "/")
    folder = Path(f"{top}{path}") / f"m2n-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            name = "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
            (folder / name).write_text(str(200 * MB))
        except OSError as error:
            pytest.skip(f"a memory cgroup can have no limit here: {error}")
        yield folder
    finally:
        folder.rmdir()


def test_a_comm_that_its_cgroup_has_no_memory_for_is_refused(cgroup: Path) -> None:
    text = run("in_cgroup", cgroup, 400)
    assert text.startswith("SetupError: memory:") and str(400 * MB) in text and str(200 * MB) in text, text


def test_a_peer_that_its_cgroup_has_no_memory_for_is_refused(cgroup: Path) -> None:
    text = run("with_more_peers_than_fit", cgroup, 60)
    number, text = text.split(" ", 1)
    assert int(number) in (2, 3) and text.startswith("SetupError: memory:") and str(200 * MB) in text, text


def test_a_send_area_that_its_cgroup_has_no_memory_for_is_refused(cgroup: Path) -> None:
    text = run("with_a_send_area_beside", cgroup, 90)
    assert text.startswith("SetupError: ") and "memory: cannot allocate the send area for one peer: " in text, text


def test_page_cache_makes_room_for_a_comm(cgroup: Path) -> None:
    assert run("with_page_cache", cgroup, 120) == "made"


def test_dev_shm_may_be_small() -> None:
    """In a container it often is; windows do not lie there."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    assert run("with_little_in_dev_shm", prefix=prefix) == f"{MB} made"


@pytest.fixture(scope="module")
def preloaded() -> Iterator[tuple[str, ...]]:
    """Command words by which a program is short of something now and then (short_of.c)."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory(prefix="m2n-", dir="/tmp") as folder:  # LD_PRELOAD takes no path with a space
        command = ["cc", "-O1", "-shared", "-fPIC", "short_of.c", "-o", f"{folder}/short_of.so", "-ldl"]
        subprocess.run(command, cwd=SUPPORT, check=True, timeout=60)
        yield "env", f"LD_PRELOAD={folder}/short_of.so"


def test_a_signal_does_not_keep_a_comm_from_its_memory(preloaded: tuple[str, ...]) -> None:
    assert run("with_interrupted_calls", prefix=preloaded) == "made"


def test_a_comm_that_can_have_no_thread_is_refused(preloaded: tuple[str, ...]) -> None:
    *told, blocked = run("without_threads", prefix=preloaded).splitlines()
    names = "m2n-watcher", "m2n-faulty", "of an emulated device"
    for text, name in zip(told, names, strict=True):
        assert text.startswith(f"SetupError: cannot start the thread {name}: Resource temporarily unavailable"), text
    assert blocked == "[]"
