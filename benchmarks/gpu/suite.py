# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: everything that a GPU is needed for, in one command of under 9 minutes.

Builds into build/gpu with what is installed (nvcc 12 or later, cmake, pybind11, torch, numpy, pytest; nothing is
downloaded), compares virtual ranks and the conformance suite with the oracle, lets compute-sanitizer watch, times what
one GPU allows, and writes benchmarks/results/<device>-<date>.json. Without a GPU it compiles and says so.
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/gpu"
STAGE = BUILD / "stage"
# What a tool says when it cannot watch this device at all.
REFUSALS = r".*(?:not supported|[Uu]nable to|[Ff]ailed to initialize|LibraryNotLoaded|insufficient|Duplicate GPU).*"


def words_of(command: list[str]) -> str:
    """The first line that a command prints, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return (done.stdout.strip() or done.stderr.strip() or "not known").splitlines()[0]


def nvcc_release() -> str:
    """As "13.0, V13.0.88"."""
    done = subprocess.run([os.environ.get("CUDACXX", "nvcc"), "--version"], capture_output=True, text=True, timeout=60)
    found = re.search(r"release (.+)", done.stdout)
    return found[1] if found else "not known"


def find_tool(name: str) -> str | None:
    """On PATH, or beside the compiler that CUDA ships it with."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which(name) or shutil.which(name, path=beside)


def find_gpu() -> dict[str, str] | None:
    """Name, driver and compute capability of the first GPU; None where there is none."""
    found = words_of(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"])
    parts = [part.strip() for part in found.split(",")]
    if len(parts) != 3 or not re.fullmatch(r"\d+\.\d+", parts[2]):
        return None
    return dict(zip(("name", "driver", "compute_capability"), parts))


def preloadable(library: Path) -> str:
    """For LD_PRELOAD, where a path ends at a space or colon: its own path, else that of a link to it."""
    path = library.resolve()
    if not re.search(r"[\s:]", str(path)):
        return str(path)
    folder = Path(tempfile.mkdtemp(prefix="m2n-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder)
    (folder / path.name).symlink_to(path)
    return str(folder / path.name)


class Run:
    """The steps of a run and what became of them. only: words, one of which a step's name must hold; none: all."""

    def __init__(self) -> None:
        self.only: list[str] = []
        self.steps: list[dict[str, Any]] = []

    def is_wanted(self, name: str) -> bool:
        return not self.only or any(word in name for word in self.only)

    def step(self, name: str, command: list[str], timeout_s: float, may_refuse: bool = False, **env: str) -> str:
        """Runs a command; its output. The outcome is "passed", "failed" or (a tool that refuses) "not run"."""
        if not self.is_wanted(name):
            return ""
        print(f"\n--- {name}", flush=True)
        began = time.monotonic()
        # Safe path: the tree itself holds an m2n without its module.
        path = f"{STAGE}{os.pathsep}{ROOT / 'tests'}"
        # Ranks as streams: with fewer connections than streams one that waits holds up another behind it.
        streams = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        environment = {**os.environ, **streams, "M2N_TEST_TELL": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=timeout_s,
            )  # fmt: skip
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else ""
            output, code = f"{output}\nended after {timeout_s:.0f} s", -1
        except OSError as error:
            output, code = str(error), -1
        outcome, words = ("passed" if code == 0 else "failed"), ""
        if code != 0:
            refusal = re.search(REFUSALS, output) if may_refuse else None
            outcome, words = ("not run", refusal[0].strip()) if refusal else ("failed", output[-2000:])
        (BUILD / "logs").mkdir(parents=True, exist_ok=True)
        (BUILD / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.txt").write_text(output)
        took = round(time.monotonic() - began, 1)
        self.steps.append({"step": name, "outcome": outcome, "seconds": took, "words": words})
        print(output[-1500:].rstrip(), f"\n--- {name}: {outcome} in {took} s", sep="", flush=True)
        return output

    def skip(self, name: str, reason: str) -> None:
        """Notes a step that cannot run here."""
        if not self.is_wanted(name):
            return
        self.steps.append({"step": name, "outcome": "not run", "seconds": 0, "words": reason})
        print(f"--- {name}: not run: {reason}", flush=True)

    @property
    def has_failed(self) -> bool:
        return any(step["outcome"] == "failed" for step in self.steps)


def build(run: Run, gpu: dict[str, str] | None) -> None:
    """Compiles the module and the timing program, and lays out a package to import."""
    import pybind11

    arch = [f"-DCMAKE_CUDA_ARCHITECTURES={gpu['compute_capability'].replace('.', '')}-real"] if gpu else []
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-DM2N_CUDA=ON", *arch,
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    run.step("configure", configure, 120)
    targets = ["cmake", "--build", str(BUILD), "--parallel", "--target", "_C", "m2n_gpu_timing", "m2n_gate_dispatch"]
    run.step("build", targets, 300)
    lay_out()
    # Says whether the driver is found, by itself: the module loads without one.
    run.step("m2n info", [sys.executable, "-m", "m2n", "info"], 60)


def lay_out() -> None:
    """The package as it would be installed, of links."""
    shutil.rmtree(STAGE, ignore_errors=True)
    (STAGE / "m2n").mkdir(parents=True)
    for source in [*(ROOT / "m2n").glob("*.py"), *BUILD.glob("_C.*.so")]:
        (STAGE / "m2n" / source.name).symlink_to(source)
    for folder in ("benchmarks", "reference_model"):
        (STAGE / "m2n" / folder).symlink_to(ROOT / folder)


def check(run: Run) -> None:
    """Compares with the oracle, and lets the tools watch."""
    ranks = [sys.executable, str(ROOT / "tests/support/virtual_ranks.py"), "cuda:0"]
    # Kernels of torch that are loaded behind a kernel that waits would wait for it.
    eager = {"CUDA_MODULE_LOADING": "EAGER"}
    run.step("oracle on virtual ranks", [*ranks, "2"], 90, **eager)
    run.step("example: a kernel that dispatches", [str(BUILD / "m2n_gate_dispatch")], 30)
    files = [
        str(ROOT / "tests/exchange" / name)
        for name in ("test_exchange.py", "test_device.py", "test_launches.py", "test_graphs.py", "test_mixed.py")
    ]
    suite = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    run.step("conformance suite", [*suite, *files], 240, **eager)
    if importlib.util.find_spec("transformers") is None:
        run.skip("reference model", "transformers, which its tokens are compared with, is not installed")
    else:
        files = [str(ROOT / "tests" / name) for name in ("test_disaggregated.py", "test_rounds.py")]
        run.step("reference model", [*suite, *files], 150, **eager)
        generate = [sys.executable, "-m", "m2n.reference_model", "--max-new-tokens", "24", "--reduce-at", "attention"]
        generate += ["--prompt", "Abraham", "--prompt", "Moses", "--verify"]
        ranks_on_gpu = ["--device", "cuda", "--attention-ranks", "2", "--expert-ranks", "2"]
        run.step("m2n-generate", [*generate, *ranks_on_gpu], 45, **eager)
        run.step("m2n-generate in CUDA graphs", [*generate, *ranks_on_gpu, "--cuda-graphs"], 45, **eager)
        run.step("m2n-generate with experts on the GPU", [*generate, "--expert-device", "cuda"], 45, **eager)
    tool = find_tool("compute-sanitizer")
    for check_name in ("memcheck", "synccheck"):
        name = f"compute-sanitizer {check_name}"
        if tool is None:
            run.skip(name, "compute-sanitizer is not on PATH")
            continue
        command = [tool, "--tool", check_name, "--error-exitcode", "99", "--target-processes", "all", *ranks]
        # Each tensor its own allocation, so that its end is watched too. Kernels are loaded at their first launch,
        # which nothing waits for here: the tool would take minutes for all of torch's.
        watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
        run.step(name, command, 120, may_refuse=True, **watched)


def time_it(run: Run, nccl: Path | None = None, timeline: Path | None = None) -> list[dict[str, Any]]:
    """What one GPU allows, and what the verbs take; a drawing of the pipeline where one is wanted. nccl: a library in
    place of torch's."""
    timing = str(BUILD / "m2n_gpu_timing")
    output = run.step("limits and puts", [timing], 120)
    output += "\n" + run.step("signal by stream memory operations", [timing, "--stream-signal"], 20, may_refuse=True)
    verbs = [sys.executable, str(ROOT / "benchmarks/gpu/verbs.py")]
    output += "\n" + run.step("verbs", verbs, 180, CUDA_MODULE_LOADING="EAGER")
    waits = [sys.executable, "-m", "m2n.benchmarks.gpu.waits"]
    output += "\n" + run.step("waits by kernels and by streams", waits, 60, CUDA_MODULE_LOADING="EAGER")
    figures = [sys.executable, "-m", "m2n.benchmarks.gpu.figures"]
    output += "\n" + run.step("figures 11 and 12", figures, 75, CUDA_MODULE_LOADING="EAGER")
    if importlib.util.find_spec("safetensors") is None:
        run.skip("ping-pong on streams", "safetensors, which the reference model is read with, is not installed")
    else:
        can_draw = timeline is not None and importlib.util.find_spec("matplotlib") is not None
        pingpong = [sys.executable, "-m", "m2n.benchmarks.gpu.pingpong"]
        pingpong += ["--timeline", str(timeline)] if can_draw else []
        output += "\n" + run.step("ping-pong on streams", pingpong, 100, CUDA_MODULE_LOADING="EAGER")
    # Last: ranks that several processes have on one GPU are an experiment of NCCL's, and may hang.
    ranks_share_a_gpu = {"CUDA_MODULE_LOADING": "EAGER", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    if nccl is not None:  # torch finds its own by its RPATH, before any LD_LIBRARY_PATH
        ranks_share_a_gpu["LD_PRELOAD"] = preloadable(nccl)
    put = ["nccl-put", *(["--nccl", str(nccl.resolve())] if nccl is not None else [])]
    for name, options in (
        ("processes, m2n and NCCL", ["nccl"]),
        ("processes, m2n and ncclPutSignal", put),
        ("processes, m2n whose streams wait and ncclPutSignal", [*put, "--stream-waits"]),
    ):
        beside = [sys.executable, "-m", "m2n.benchmarks.gpu.nccl", "--peer", *options]
        output += "\n" + run.step(name, beside, 60, may_refuse=True, **ranks_share_a_gpu)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for row in rows:
        if row["bytes"] >= 2**20:
            row["gb_per_s"] = round(row["bytes"] / row["p50_us"] / 1e3, 1)
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names hold one of these, after building")
    parser.add_argument(
        "--nccl", type=Path, metavar="FILE", help="instead of torch's (ranks on one GPU: 2.30 or later)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the result file")
    options = parser.parse_args()
    for module in ("pybind11", "numpy"):
        if importlib.util.find_spec(module) is None:
            sys.exit(f"make gpu: {sys.executable} has no {module}; name another one: make gpu PYTHON=...")
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        sys.exit("make gpu: no nvcc on PATH; install the CUDA toolkit (12 or later), or set CUDACXX")
    gpu, run = find_gpu(), Run()
    build(run, gpu)
    run.only = options.only or []
    if gpu is None:
        print(f"\nmake gpu: {'compiling FAILED' if run.has_failed else 'compiled'}; there is no GPU here to run it on")
        return int(run.has_failed)
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"make gpu: {sys.executable} has no torch; name another one: make gpu PYTHON=...")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}-{date}"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    if not run.has_failed:
        check(run)
        rows = time_it(run, options.nccl, (options.output / f"timeline-{name}.png").resolve())
    torch_version = words_of([sys.executable, "-c", "import torch; print(torch.__version__)"])
    result = {
        "machine": {
            **gpu, "nvcc": nvcc_release(),
            "torch": torch_version, "python": platform.python_version(), "cores": os.cpu_count(),
            "kernel": platform.release(),
        },
        "date": date,
        "command": " ".join(["make gpu", *(["GPU_FLAGS='" + " ".join(sys.argv[1:]) + "'"] if sys.argv[1:] else [])]),
        "steps": run.steps,
        "rows": rows,
    }  # fmt: skip
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nmake gpu: {path}")
    for step in run.steps:
        last_words = (step["words"].splitlines() or [""])[-1][:100]
        print(f"  {step['outcome']:8} {step['seconds']:6.1f} s  {step['step']}  {last_words}")
    for row in rows:
        beside = f"  {row['ratio']:.2f} of {row['limit']}" if "limit" in row else ""
        goal = f"; goal: {row['goal']}" if "goal" in row else ""
        words = f"{row['name']}{beside}{goal}"
        print(f"  {row['p50_us']:10.2f} us p50 {row['p99_us']:10.2f} us p99  {row['bytes']:>10} B  {words}")
    return int(run.has_failed)


if __name__ == "__main__":
    sys.exit(main())
