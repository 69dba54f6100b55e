# SPDX-License-Identifier: Apache-2.0
"""m2n-bench balance: a tiny run of it, which settings it tries on which cores, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

from m2n.benchmarks import cli  # noqa: E402
from m2n.benchmarks.harness.pool import Pool  # noqa: E402
from m2n.benchmarks.pipeline import balance
from m2n.benchmarks.pipeline.balance import Options, Setting  # noqa: E402

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.mark.slow
@needs_two_cores
def test_a_tiny_run_writes_the_busy_shares_of_both_roles_before_and_after(tmp_path: Path) -> None:
    options = "balance --rounds 1 --steps 5 --sequences 8 --hidden 32 --layers 2 --expert-work 3 --settings 1x2x1x1"
    assert cli.main([*shlex.split(options), "--json", str(tmp_path / "out.json")]) == 0
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["command"].startswith("m2n-bench balance --rounds 1") and about["machine"]["date"]
    assert [(row["m"], row["n"]) for row in about["rows"]] == [(1, 1), (1, 2)]
    assert about["before"] == about["rows"][0] and about["after"] in about["rows"] and about["gain"] >= 1
    for row in about["rows"]:
        assert row["tokens_per_s"] > 0 and row["t_a_us"] > 0 and row["t_e_us"] > 0
        assert all(0 < row[f"{role}_busy"] <= 1 for role in ("attention", "expert"))
    assert about["advice_before"]


def test_settings_have_few_threads_and_ranks_cores_of_their_own_where_there_are_enough() -> None:
    assert [str(each) for each in balance.default_settings(2)] == [
        "1x1x1x1",
        "1x1x1x2",
        "1x1x2x1",
        "1x2x1x1",
        "2x1x1x1",
    ]
    assert max(each.num_threads for each in balance.default_settings(6)) == 6
    assert balance.cores_of(Setting(2, 1, 1, 2), [4, 5, 6, 7, 8]) == [[4], [5], [6, 7]]
    assert balance.cores_of(Setting(1, 2), [4, 5]) == [[4, 5]] * 3


def test_after_is_the_setting_with_most_tokens_and_its_gain_is_that_of_each_round() -> None:
    def run(tokens_per_s: float, attention_busy: float, expert_busy: float) -> SimpleNamespace:
        shares = {"communicating": 0.0, "waiting": 0.0}
        ranks = [
            {"role": "attention", "busy": attention_busy, **shares},
            {"role": "expert", "busy": expert_busy, **shares},
        ]
        pipeline = {"ranks": ranks, "t_a_us": 1.0, "t_e_us": 2.0, "advice": ["use more expert ranks"]}
        return SimpleNamespace(tokens_per_s=tokens_per_s, pipeline=pipeline)

    before, after = Setting(1, 1), Setting(1, 2)
    runs = {
        before: [run(10, 0.5, 1.0), run(20, 0.4, 1.0), run(11, 0.6, 1.0)],
        after: [run(18, 0.9, 0.9), run(24, 0.9, 0.8), run(16.5, 0.9, 0.7)],
    }
    about = balance.report(Options(before, (before, after), (0, 1)), runs)
    assert (about["gain"], about["gain_min_max"]) == (1.5, [1.2, 1.8])
    assert (about["before"]["attention_busy"], about["before"]["expert_busy"]) == (0.5, 1.0)
    assert (about["after"]["n"], about["after"]["expert_busy"], about["after"]["cores"]) == (2, 0.8, "shared")
    assert about["advice_before"] == ["use more expert ranks"]


@needs_two_cores
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--before 1", "--before: expected MxN or MxNxTxT"),
        ("--before 1x5", "at most 4 expert ranks, got '1x5'"),
        ("--settings 1x2,0x1", "--settings: expected MxN or MxNxTxT"),
        ("--settings 3x1 --sequences 8", "--sequences: 8 cannot be split into the 6 equal parts of 3x1x1x1"),
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--steps 3", "--steps: expected at least 4, got 3"),
        ("--microbatches 0", "--microbatches: expected 1 to 63, got 0"),
        ("--expert-work 0", "--expert-work: expected 0.05 to 20, got 0.0"),
        ("--json /nowhere/out.json", "/nowhere/out.json"),
    ],
)
def test_bad_options_are_refused_before_any_process_starts(
    options: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "__init__", lambda self, num_workers: pytest.fail("a process was started"))
    assert cli.main(["balance", *shlex.split(options)]) == 2
    assert expected in capsys.readouterr().err
