# SPDX-License-Identifier: Apache-2.0
"""m2n-bench pingpong: a tiny run of it, its arithmetic, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

from m2n.benchmarks import cli  # noqa: E402
from m2n.benchmarks.harness.pool import Job, Pool, WorkerFailed  # noqa: E402
from m2n.benchmarks.pipeline.pingpong import command as pingpong_command  # noqa: E402
from m2n.benchmarks.pipeline.pingpong.bench import FIXED_GLOBAL_BATCH, FIXED_MICROBATCH, Options, per_s  # noqa: E402

MICROBATCHES = (1, 2, 3, 4)
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.mark.slow
@needs_two_cores
def test_a_tiny_run_writes_both_tables_the_gains_and_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("out.json", "plot.png", "timeline.png", "trace.json")}
    options = shlex.split("pingpong --rounds 1 --steps 5 --sequences 2 --hidden 32 --layers 2 --least-tf-ms 0")
    options += ["--ratios", "0,0.5", "--json", files["out.json"], "--plot", files["plot.png"]]
    options += ["--timeline", files["timeline.png"], "--trace", files["trace.json"]]
    assert cli.main([str(option) for option in options]) == 0
    about = json.loads(files["out.json"].read_text())
    assert about["machine"]["cores"] and about["command"].startswith("m2n-bench pingpong --rounds 1")
    assert 0.2 < about["cores_speedup"] < 4
    for part in (about, about["fixed_global_batch"]):
        for name in ("gain_1_to_2", "gain_2_to_3"):
            assert [gain["tc_over_tf"] for gain in part[name]] == [0, 0.5]
            assert all(gain["measured"] > 0 and gain["simulated"] > 0 for gain in part[name])
    assert about["gain_1_to_2"][0]["paper"] == 1.9
    for name, sizes in ((FIXED_MICROBATCH, [2, 2, 2, 2]), (FIXED_GLOBAL_BATCH, [4, 2, 1, 1])):
        rows = about[name]["rows"]
        assert [row["microbatches"] for row in rows] == 2 * list(MICROBATCHES)
        assert [row["sequences_per_microbatch"] for row in rows] == 2 * sizes
        for row in rows:
            assert row["tokens_per_s"] > 0 and row["between_tokens_p99_ms"] >= row["between_tokens_p50_ms"] > 0
            # Signals were held back as long as was asked for, and not at all where nothing was.
            assert (row["held_ms"] >= 0.5 * about["t_f_ms"] * 0.99) == (row["tc_over_tf"] == 0.5)
    assert about["trace_cost"]["ns_per_event"] > 0 and about["trace_cost"]["events_per_step"] > 2 * 4
    assert len(about["deployments"]) == 5 and all(row["tokens_per_s"] > 0 for row in about["deployments"])
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in ("plot.png", "timeline.png"))
    assert json.loads(files["trace.json"].read_text())["traceEvents"]


def test_tokens_are_counted_after_the_warm_up() -> None:
    # Two sequences, a token each per second, half a second apart; the first tokens are slow.
    times = {0: [7.0, 8.0, 9.0, 10.0], 1: [7.5, 8.5, 9.5, 10.5]}
    assert per_s(times) == pytest.approx(2.0)


def test_the_global_batch_is_that_of_two_microbatches() -> None:
    sizes = Options(cores=(0, 1), sequences=24).sizes
    assert [sizes[FIXED_MICROBATCH, m] for m in MICROBATCHES] == [24, 24, 24, 24]
    assert [sizes[FIXED_GLOBAL_BATCH, m] for m in MICROBATCHES] == [48, 24, 16, 12]


def fail(kept: dict[str, object], text: str) -> None:
    raise ValueError(text)


def die(kept: dict[str, object]) -> None:
    os._exit(7)


def test_a_job_that_fails_and_a_worker_that_dies_are_reported() -> None:
    with Pool(1) as pool:
        with pytest.raises(WorkerFailed, match="ValueError: what is wrong"):
            pool.run(Job(0, [min(os.sched_getaffinity(0))], fail, "what is wrong"))
        with pytest.raises(WorkerFailed, match="worker 0 died with exit code 7"):
            pool.run(Job(0, [min(os.sched_getaffinity(0))], die))


@needs_two_cores
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--steps 3", "--steps: expected at least 4, got 3"),
        ("--sequences 0", "--sequences"),
        ("--layers 0", "--layers: expected at least 1, got 0"),
        ("--hidden 24", "--hidden: expected a multiple of 16, got 24"),
        ("--ratios 0,x", "--ratios: expected numbers"),
        ("--ratios 0,-1", "--ratios: expected T_c/T_f"),
        ("--json /nowhere/out.json", "/nowhere/out.json"),
        ("--trace /nowhere/out.json", "/nowhere/out.json"),
    ],
)
def test_bad_options_are_refused_before_any_process_starts(
    options: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "__init__", lambda self, num_workers: pytest.fail("a process was started"))
    assert cli.main(["pingpong", *shlex.split(options)]) == 2
    assert expected in capsys.readouterr().err


def test_without_its_extras_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pingpong_command, "PROGRAM_NEEDS", (*pingpong_command.PROGRAM_NEEDS, "no_such_package"))
    assert cli.main(["pingpong"]) == 2
    assert "needs no_such_package: pip install 'm2n[bench]'" in capsys.readouterr().err
