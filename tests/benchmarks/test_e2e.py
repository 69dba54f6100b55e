# SPDX-License-Identifier: Apache-2.0
"""m2n-bench e2e: a tiny run of it, its arithmetic, the verbs on gloo that it compares with, and what it refuses."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from m2n.benchmarks import cli  # noqa: E402
from m2n.benchmarks.contenders.torch_verbs import TorchAttentionComm, TorchExpertComm  # noqa: E402
from m2n.benchmarks.harness.pool import Job, Pool  # noqa: E402
from m2n.benchmarks.harness.runs import RunFailed  # noqa: E402
from m2n.benchmarks.harness.synthetic import ModelShape, write_checkpoint  # noqa: E402
from m2n.benchmarks.pipeline import e2e  # noqa: E402
from m2n.reference_model.engine.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.errors import InputError  # noqa: E402
from m2n.reference_model.run.rank import run_rank  # noqa: E402
from m2n.reference_model.run_config import ATTENTION, RunConfig  # noqa: E402

TINY = "--cases 1x1x2,2x1x1 --rounds 1 --steps 12 --sequences 12 --hidden 32 --layers 2"
COMMS = (TorchAttentionComm, TorchExpertComm)


def parse(options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    e2e.add_parser(parser.add_subparsers())
    return parser.parse_args(["e2e", *shlex.split(options)])


@pytest.mark.slow
def test_a_tiny_run_has_a_row_for_each_contender_of_each_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse(f"{TINY} --json {tmp_path / 'out.json'}")
    args.run(args, "m2n-bench e2e ...")
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["machine"]["cores"] and about["command"] == "m2n-bench e2e ..."
    names = [(row["m"], row["n"], row["microbatches"], row["contender"], row["processes"]) for row in about["rows"]]
    assert names == [
        (m, n, microbatches, *contender)
        for m, n, microbatches in ((1, 1, 2), (2, 1, 1))
        for contender in (("m2n", m + n), ("gloo", m + n), ("monolithic", 1), ("monolithic", m + n))
    ]
    for row in about["rows"]:
        assert row["rounds"] == 1 and row["sequences"] == 12
        assert row["tokens_per_s_min"] > 0 and row["tbt_p99_ms"] >= row["tbt_p50_ms"] > 0
        if row["contender"] == "m2n":
            assert row["tokens_per_s_over_m2n"] == row["tbt_p50_over_m2n"] == row["tbt_p99_over_m2n"] == 1
    printed = capsys.readouterr().out
    assert "monolithic, 3 x 1" in printed and "gloo" in printed


def run_with_gloo(
    kept: dict[str, Any], run: RunConfig, role: str, rank: int, store: str, prompts: list[list[int]]
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    share = {idx: prompts[idx] for idx in run.share(rank, len(prompts))} if role == ATTENTION else {}
    comms = [functools.partial(comm, attention_ranks=run.attention_ranks) for comm in COMMS]
    run_rank(run, role, rank, share, store, events.append, comms=(comms[0], comms[1]))
    return [{**event, "role": role, "rank": rank} for event in events]


@pytest.mark.slow
def test_the_verbs_on_gloo_draw_the_tokens_of_the_monolithic_model(tmp_path: Path) -> None:
    # Attention ranks with unlike shares: they are not in step, and one leaves before the other.
    checkpoint = write_checkpoint(tmp_path / "model", ModelShape(32, 32, 2, 5, 2, 4, 2))
    run = RunConfig(
        str(checkpoint), attention_ranks=2, expert_ranks=2, microbatches=2, max_batch=2, max_tokens=4,
        max_new_tokens=7, ignore_eos=True, timeout_s=20.0,
    )  # fmt: skip
    prompts, cores = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7]], sorted(os.sched_getaffinity(0))
    with Pool(4) as pool:
        jobs = [
            Job(worker, cores, run_with_gloo, run, role, rank, str(tmp_path), prompts)
            for worker, (role, rank) in enumerate(run.ranks)
        ]
        events = [event for part in pool.run(*jobs) for event in part]
    expected = MonolithicModel(checkpoint).generate(prompts, 7, groups=[[0, 1, 2], [3, 4]], ignore_eos=True)
    assert e2e.answers_of(events) == dict(enumerate(expected))
    done = {(event["role"], event["rank"]): event["stats"] for event in events if event["event"] == "done"}
    sent, received = (
        sum(done[role, rank][f"bytes_{way}"] for rank in (0, 1))
        for role, way in (("attention", "sent"), ("expert", "received"))
    )
    assert sent == received > 0


def test_tokens_are_counted_while_all_sequences_are_at_work() -> None:
    # One begins two seconds later, so from 5 s to 7 s: three tokens each.
    early, late = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert e2e.tokens_per_s([early, late]) == pytest.approx(2.0)
    assert e2e.tokens_per_s([early[:4], late]) == pytest.approx(4 / 4)  # never together


def test_tokens_that_differ_are_an_error() -> None:
    case, (ours, *_, alone) = e2e.Case(1, 2, 2), e2e.contenders_of(e2e.Case(1, 2, 2), 2)
    e2e.check_answers(case, {ours: {0: [1, 2]}, alone: {0: [1, 2]}})
    for wrong in ({0: [1, 3]}, {}, {0: [1, 2], 1: [4]}):
        with pytest.raises(RunFailed, match="m2n at 1 x 2, m = 2: the tokens of sequence"):
            e2e.check_answers(case, {ours: wrong, alone: {0: [1, 2]}})


def test_monolithic_gets_the_cores_of_the_case() -> None:
    shapes = [(each.name, each.processes, each.threads) for each in e2e.contenders_of(e2e.Case(2, 2, 2), 2)]
    assert shapes == [("m2n", 4, 1), ("gloo", 4, 1), ("monolithic", 1, 2), ("monolithic", 4, 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--cases 1x1", "--cases: expected MxNxm"),
        ("--cases 1x1x1x1", "--cases: expected MxNxm"),
        ("--cases 1xax1", "--cases: expected MxNxm"),
        ("--cases 0x1x1", "--cases: expected MxNxm"),
        ("--cases 1x1x1,1x1x1", "each once"),
        ("--cases 1x9x1 --sequences 10", "--cases: 1x9x1: the model has 4 experts"),
        ("--cases 1x1x64 --sequences 64", "microbatches: expected at most 63"),
        ("--sequences 10", "--cases: 2x1x2: 10 sequences are to be split into 4 and 3 equal parts"),
        ("--sequences 0", "--sequences: expected at least 1, got 0"),
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--steps 3", "--steps: expected at least 4, got 3"),
        ("--layers 0", "--layers: expected at least 1, got 0"),
        ("--hidden 24", "--hidden: expected a multiple of 16, got 24"),
        ("--json /nowhere/out.json", "/nowhere/out.json"),
    ],
)
def test_bad_options_are_refused_before_any_process_starts(
    options: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "__init__", lambda self, num_workers: pytest.fail("a process was started"))
    args = parse(options)
    with pytest.raises(InputError, match=re.escape(expected)):
        cli._run(args, "m2n-bench e2e")


def test_faults_that_only_m2n_would_feel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_FAULTS", "delay_us=5")
    with pytest.raises(InputError, match="M2N_FAULTS is set"):
        e2e.options_of(parse(TINY))
