# SPDX-License-Identifier: Apache-2.0
"""The peers at the C++ boundary, UCX and MPI: plug-ins of `m2n_ranks`, compiled where their library is installed."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import m2n

NAMES = ("ucx-shm", "ucx-tcp", "mpi")

_SOURCES = Path(__file__).parents[1] / "contenders/native"
_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 120
_NO_COMPILER = "no C++ compiler: apt-get install g++"
_NO_UCX = "UCX is not installed: pip install libucx-cu12, or apt-get install libucx-dev"
_NO_MPI = "MPI is not installed: apt-get install openmpi-bin libopenmpi-dev"
# Open MPI's copy through two pieces of shared memory, in pieces of 256 KB: on two cores at 1 MB 64 us, by the default
# (the receiver's kernel copies from the sender's memory) 138 us. Where processes share cores the default is faster: it
# needs no second process. Versions without such a setting ignore it.
_OPEN_MPI_PINNED = {
    "btl_vader_single_copy_mechanism": "none",
    "btl_vader_max_send_size": "262144",
    "btl_vader_eager_limit": "32768",
}


class _Missing(Exception):
    """Why a plug-in cannot be had here, in words for the user."""


@dataclass(frozen=True)
class Plugin:
    """One contender that is compiled here. `library` is None where that cannot be, and `reason` says why."""

    name: str
    library: Path | None
    reason: str = ""


@functools.cache
def find(name: str) -> Plugin:
    """The plug-in of this name, one of NAMES; compiled at the first call (2 s) and kept in the user's cache."""
    source, find_compiler = ("mpi.cc", _mpi_compiler) if name == "mpi" else ("ucx.cc", _ucx_compiler)
    try:
        return Plugin(name, _compile(source, *find_compiler()))
    except _Missing as missing:
        return Plugin(name, None, str(missing))


def native_transport(name: str) -> str:
    """A transport of m2n as its ranks at the C++ boundary are given it; UCX goes over TCP."""
    if name != "ucx":
        return name
    library = m2n.Config().ucx_library
    options = ["insecure=1", "TLS=tcp,self", *([f"library={library}"] if library else [])]
    wheel = importlib.util.find_spec("libucx")
    folders = (wheel.submodule_search_locations or ()) if wheel else ()
    return ";".join(["ucx", *options, *(f"beside={folder}/lib/libucp.so.0" for folder in folders if ";" not in folder)])


def _ucx_compiler() -> tuple[str, list[str]]:
    """The compiler and what it must be told of UCX: of the wheel `libucx-*`, else of the system."""
    compiler = shutil.which("c++")
    if compiler is None:
        raise _Missing(_NO_COMPILER)
    wheel = importlib.util.find_spec("libucx")
    for folder in map(Path, (wheel.submodule_search_locations or ()) if wheel else ()):
        if (folder / "include/ucp/api/ucp.h").exists():
            lib = folder / "lib"
            return compiler, [
                f"-I{folder / 'include'}",
                f"-L{lib}",
                "-Xlinker",
                "-rpath",
                "-Xlinker",
                str(lib),
                "-lucp",
            ]
    if shutil.which("pkg-config") is not None:
        found = _run(["pkg-config", "--cflags", "--libs", "ucx"])
        if found.returncode == 0:
            return compiler, shlex.split(found.stdout)
    if Path("/usr/include/ucp/api/ucp.h").exists():
        return compiler, ["-lucp"]
    raise _Missing(_NO_UCX)


def _mpi_compiler() -> tuple[str, list[str]]:
    compiler = shutil.which("mpicxx")
    if compiler is None or shutil.which("mpirun") is None:
        raise _Missing(_NO_MPI)
    return compiler, ["-DOMPI_SKIP_MPICXX", "-DMPICH_SKIP_MPICXX"]  # not the C++ names that MPI once had


def _compile(source: str, compiler: str, options: list[str]) -> Path:
    """The library, from the cache if the same compiler has made it from the same text."""
    command = [compiler, *_FLAGS, str(_SOURCES / source), *options]
    made_by = [os.path.realpath(compiler), _run([compiler, "--version"]).stdout, *command]
    texts = b"".join((_SOURCES / name).read_bytes() for name in (source, "contender.h"))
    folder = _cache_folder(hashlib.sha256("\0".join(made_by).encode() + texts).hexdigest()[:16])
    library = folder / f"{Path(source).stem}.so"
    if library.exists():
        return library
    # Under a name of its own first: another process may compile the same.
    partial = folder / f"{library.name}.{os.getpid()}"
    try:
        done = _run([*command, "-o", str(partial)])
    except subprocess.TimeoutExpired:
        raise _Missing(f"{source} does not compile within {_COMPILE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise _Missing(f"{source} does not compile: {errors[0] if errors else 'the compiler gives no reason'}")
    os.replace(partial, library)
    return library


def _cache_folder(key: str) -> Path:
    """A folder that can be written: in the user's cache, or a temporary one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache) / "m2n-bench" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(_temporary_folder().name) / key
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Goes with this process."""
    return tempfile.TemporaryDirectory(prefix="m2n-bench-")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def mpirun(num_processes: int) -> list[str]:
    """mpirun for processes that pin themselves. Those of MPICH and Intel need no more than the number."""
    command = ["mpirun", "-np", str(num_processes)]
    if "Open MPI" not in _run(["mpirun", "--version"]).stdout:
        return command
    # Containers have only root. Without its UCX, which may be another version than that of the plug-in beside it.
    command += ["--allow-run-as-root", "--bind-to", "none", "--mca", "pml", "ob1", "--mca", "osc", "^ucx"]
    if num_processes > len(os.sched_getaffinity(0)):
        return [*command, "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]
    for key, value in _OPEN_MPI_PINNED.items():
        command += ["--mca", key, value]
    return command
