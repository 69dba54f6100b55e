# SPDX-License-Identifier: Apache-2.0
"""`make gpu` (benchmarks/gpu/suite.py): what it makes of tools that pass, fail, refuse, hang or are missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import m2n

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks/gpu/suite.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_command", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    "code, may_refuse, outcome, words",
    [
        ("print('fine')", False, "passed", ""),
        ("print('Device not supported')", True, "passed", ""),  # it ended well all the same
        ("import sys; sys.exit('wrong result')", False, "failed", "wrong result"),
        ("import sys; sys.exit('wrong result')", True, "failed", "wrong result"),
        ("import sys; sys.exit('Error: Device not supported')", True, "not run", "Error: Device not supported"),
        ("import sys; sys.exit('Error: Device not supported')", False, "failed", "not supported"),
    ],
)
def test_outcomes_of_a_step(gpu: ModuleType, code: str, may_refuse: bool, outcome: str, words: str) -> None:
    run = gpu.Run()
    run.step("it", python(code), 30, may_refuse=may_refuse)
    (step,) = run.steps
    assert step["outcome"] == outcome and words in step["words"]
    assert run.has_failed == (outcome == "failed")


def test_a_step_that_hangs_or_is_missing_has_failed(gpu: ModuleType) -> None:
    run = gpu.Run()
    run.step("hangs", python("import time; print('so far', flush=True); time.sleep(60)"), 1)
    run.step("missing", ["/nowhere/tool"], 1)
    run.skip("absent", "is not on PATH")
    assert [step["outcome"] for step in run.steps] == ["failed", "failed", "not run"]
    assert "ended after 1 s" in run.steps[0]["words"] and "/nowhere/tool" in run.steps[1]["words"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("NVIDIA H200, 580.159.04, 9.0", {"name": "NVIDIA H200", "driver": "580.159.04", "compute_capability": "9.0"}),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", None),
        ("No devices were found", None),
    ],
)
def test_a_gpu_is_found_by_what_nvidia_smi_says(
    gpu: ModuleType, answer: str, expected: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "{answer}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.find_gpu() == expected
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.find_gpu() is None


def test_the_package_of_a_run_holds_what_its_steps_import(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, stage = Path(m2n._C.__file__), tmp_path / "stage"
    (tmp_path / native.name).symlink_to(native)
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu, "STAGE", stage)
    gpu.lay_out()
    names = "gpu.verbs", "gpu.figures", "gpu.nccl"
    modules = ", ".join(f"m2n.benchmarks.{name}" for name in names)
    code = f"import {modules}, m2n.reference_model.run.launcher as last; print(last)"
    # Without this environment's own m2n, which a hook of its site-packages would find first.
    path = os.pathsep.join([str(stage), *(place for place in sys.path if place.endswith("-packages"))])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(stage) in done.stdout


@pytest.mark.parametrize("name", ["plain", "a space", "a:colon"])
def test_a_library_is_loaded_first_wherever_it_lies(gpu: ModuleType, name: str, tmp_path: Path) -> None:
    """LD_PRELOAD ends a path at spaces and colons, and then only warns."""
    (tmp_path / name).mkdir()
    library = tmp_path / name / "libfirst.so"
    made = subprocess.run(["cc", "-shared", "-fPIC", "-xc", "/dev/null", "-o", library], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    environment = {**os.environ, "LD_PRELOAD": gpu.preloadable(library)}
    done = subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True, env=environment)
    assert str(library) in done.stdout and not done.stderr


def test_lines_of_the_timing_program_become_rows(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "m2n_gpu_timing"
    line = '{"name": "copy", "bytes": 2097152, "samples": 50, "p50_us": 10.0, "p99_us": 11.0}'
    program.write_text(f"#!/bin/sh\necho 'a warning'\n[ $# = 0 ] && echo '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(sys, "executable", "false")  # the other steps, which need a GPU, fail at once
    (row,) = gpu.time_it(gpu.Run())
    assert row["name"] == "copy" and row["gb_per_s"] == 209.7


@pytest.mark.slow
def test_processes_beside_a_group_of_torch_run_without_a_gpu() -> None:
    """gloo in NCCL's place: rows come back as they were sent, by both, or it fails."""
    command = [sys.executable, SOURCE.with_name("nccl.py"), "--peer", "gloo", "--device", "cpu"]
    sizes = ["--tokens", "7", "--hidden", "64", "--rounds", "3", "--expert-ranks", "2"]
    done = subprocess.run([*map(str, command), *sizes], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    group, ours = map(json.loads, done.stdout.splitlines())
    assert group["bytes"] == 2 * 7 * 64 * 2 and group["samples"] == 3
    assert ours["limit"] == "gloo" and ours["limit_us"] == group["p50_us"]


@pytest.mark.slow
def test_the_pipeline_on_streams_runs_without_a_gpu(tmp_path: Path) -> None:
    """Launches on CPU threads in the place of streams; rows say what one more microbatch gained, whatever that was."""
    drawing = tmp_path / "timeline.png"
    command = [sys.executable, SOURCE.with_name("pingpong.py"), "--device", "emulated", "--timeline", drawing]
    sizes = ["--microbatches", "1", "2", "--sequences", "2", "--steps", "9", "--rounds", "1"]
    model = ["--hidden", "32", "--layers", "1"]
    done = subprocess.run([*map(str, command), *sizes, *model], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"].split(", ", 1)[1] for row in rows] == [
        f"{m} x 2 sequences, {kind}" for kind in ("launched", "in CUDA graphs") for m in (1, 2)
    ]
    for one, two in (rows[:2], rows[2:]):
        assert one["ratio"] == 1 and two["ratio"] == round(two["tokens_per_s"] / one["tokens_per_s"], 3)
        assert (one["samples"], two["samples"]) == (3 * 2, 3 * 4)
        assert 0 < one["p50_us"] <= one["p99_us"] and two["bytes"] == 2 * one["bytes"]
    assert drawing.stat().st_size > 1000
