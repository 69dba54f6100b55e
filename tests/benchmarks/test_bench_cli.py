# SPDX-License-Identifier: Apache-2.0
"""m2n-bench from the outside: tiny runs of the transport benchmarks, their files, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Leftovers

from m2n.benchmarks import cli
from m2n.benchmarks.harness import cases, plugins, runs
from m2n.reference_model.errors import InputError

TINY = ("--starts", "1", "--seconds", "0.01")


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = cli.main(words)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> dict[str, Any]:
    status, _, err = bench(capsys, *words, "--json", str(path))
    assert status == 0, err
    return json.loads(path.read_text())


def test_latency_begins_with_one_way_dispatch_of_m2n(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = run(capsys, tmp_path / "l.json", "latency", *TINY, "--sizes", "1024,65536")
    assert {"machine", "command", "options", "rows"} <= result.keys()
    first = result["rows"][0]
    assert (first["contender"], first["direction"], first["boundary"]) == ("m2n", "dispatch", "cpp")
    names = {row["contender"] for row in result["rows"]}
    assert names == {"m2n", "memcpy", "non-temporal", "hop"}
    for row in result["rows"]:
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["p999_us"] <= row["max_us"]
        assert row["samples"] >= 1 and row["throughput_gb_s"] > 0
    assert {row["bytes"] for row in result["rows"]} == {1024, 65536}


def test_grid_with_routes_of_all_kinds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = tmp_path / "routes.npz"
    np.savez(recorded, topk_ids=np.array([[0, 3], [2, 1], [5, 4]]), num_experts=6, top_k=2)
    for routing in ("zipf", "hot", str(recorded)):
        ranks = ["--ranks", "1x2,2x3" if routing == str(recorded) else "1x2,2x2"]
        words = ["grid", *TINY, *ranks, "--sizes", "16384", "--routing", routing, "--baselines", "memcpy"]
        rows = run(capsys, tmp_path / "g.json", *words)["rows"]
        assert {(row["m"], row["n"]) for row in rows} == {
            tuple(map(int, pair.split("x"))) for pair in ranks[1].split(",")
        }
        assert all(row["routing"] == routing and row["mean_bytes"] > 0 for row in rows)


def test_pair_rows_and_other_dtypes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--reduce-at", "attention", "--dtype", "float32", "--hidden", "256", "--top-k", "3", "--pin", "none")
    rows = run(capsys, tmp_path / "r.json", "roundtrip", *TINY, *words, "--sizes", "4096", "--python")["rows"]
    assert {(row["contender"], row["boundary"]) for row in rows} >= {("m2n", "cpp"), ("m2n", "python")}
    assert all(row["placement"] == "oversubscribed" and row["row_bytes"] == 1024 for row in rows)


def test_python_ranks_of_m2n_need_numpy_only() -> None:
    code = "import sys; from m2n.benchmarks.contenders import python_ranks, python; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", ["gloo", "gloo-a2a"])
def test_torch_contenders_bring_rows_back(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    words = ("--baselines", name, "--attention-ranks", "2", "--expert-ranks", "2", "--routing", "uniform")
    rows = run(capsys, tmp_path / "t.json", "latency", *TINY, *words, "--sizes", "8192")["rows"]
    assert (name, "python") in {(row["contender"], row["boundary"]) for row in rows}


@pytest.mark.parametrize("name", plugins.NAMES)
def test_peers_bring_rows_back_or_say_why_not(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    words = ("--baselines", name, "--attention-ranks", "2", "--expert-ranks", "2", "--routing", "uniform")
    rows = run(capsys, tmp_path / "p.json", "latency", *TINY, *words, "--sizes", "8192")["rows"]
    (row,) = [row for row in rows if row["contender"] == name and row["direction"] in ("roundtrip", "all")]
    reason = plugins.find(name).reason
    assert row.get("reason", "") == reason
    assert reason or row["p50_us"] > 0
    if reason:
        pytest.skip(reason)


@pytest.mark.ucx
def test_packed_and_not_packed_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--baselines", "m2n-pack", "--transport", "ucx", "--sizes", "8192", "--hidden", "512")
    rows = run(capsys, tmp_path / "u.json", "latency", *TINY, *words)["rows"]
    assert {row["contender"] for row in rows} == {"m2n", "m2n-pack"}
    assert all(row["p50_us"] > 0 and row["x_stride_rows"] == 2 for row in rows)


@pytest.mark.ucx
def test_networks_and_a_bare_socket_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--baselines", "m2n-ucx,socket", "--transport", "tcp", "--sizes", "8192", "--expert-ranks", "2")
    rows = run(capsys, tmp_path / "n.json", "sweep", *TINY, *words)["rows"]
    assert {row["contender"] for row in rows} == {"m2n", "m2n-ucx", "socket"}
    assert all(row["p50_us"] > 0 and row["transport"] == "tcp" for row in rows)


def test_a_plot_and_a_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("sweep", *TINY, "--sizes", "1024,2048", "--baselines", "memcpy")
    run(capsys, tmp_path / "old.json", *words)
    more = ("--compare", str(tmp_path / "old.json"), "--plot", str(tmp_path / "p.png"))
    compared = run(capsys, tmp_path / "new.json", *words, *more)["compared"]
    assert compared and all(row["limit_ratio"] >= 0 and row["p50_ratio"] >= 0 for row in compared)  # 0: far below 1
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "unknown contender": (("--baselines", "memcpy,zmq"), "unknown contender 'zmq'; known: memcpy"),
    "no whole rows": (("--sizes", "3000", "--hidden", "512"), "3000 bytes are no whole rows of 1024 bytes"),
    "odd row": (("--sizes", "1023"), "no whole rows"),
    "no size": (("--sizes", "1k"), "--sizes: expected whole numbers"),
    "too much memory": (("--sizes", str(1 << 40)), "MiB are free"),
    "too many ranks": (("--attention-ranks", "300"), "at most 256 in all"),
    "too many experts of a token": (("--top-k", "9"), "--top-k: expected 1 to 8"),
    "uneven experts": (("--experts", "9", "--expert-ranks", "2"), "do not spread evenly"),
    "no routes": (("--routing", "nowhere.npz"), "there is no file 'nowhere.npz'"),
    "no cores": (("--pin", "0,4096"), "--pin: expected 2 of the cores"),
    "no starts": (("--starts", "0"), "--starts: expected at least 1"),
    "no results": (("--compare", "/dev/null"), "--compare: /dev/null holds no results"),
    "unwritable": (("--json", "/nowhere/x.json"), "cannot write /nowhere/x.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(runs, "run_processes", lambda *_: pytest.fail("something was started"))
    words, text = BAD[case]
    status, out, err = bench(capsys, "latency", *words)
    assert (status, out) == (2, "")
    assert text in err


def test_a_rank_that_dies_ends_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peer does not wait for ever, nothing is left behind, and the exit status is 1."""
    shared_memory = Leftovers()
    dead = [[sys.executable, "-c", "raise SystemExit('no')"], ["sleep", "60"]]
    monkeypatch.setattr(runs, "start_python", lambda *_: runs.run_processes(dead, 30.0))
    status, _, err = bench(capsys, "latency", *TINY, "--sizes", "1024", "--python", "--baselines", "")
    assert status == 1
    assert "a run failed: no" in err
    assert not shared_memory.names_that_stay()


def test_a_forked_rank_that_fails_ends_the_others() -> None:
    """They would sleep for a minute, with the pipes of this test open."""
    code = """if True:
        import time
        from m2n.benchmarks.contenders import forked_ranks, python_ranks
        python_ranks.main = lambda folder, process, name: 1 if process == "1" else time.sleep(60)
        raise SystemExit(forked_ranks.main("", "3", "m2n"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (1, "")


def test_memory_counts_the_windows_of_m2n(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 x 32 ranks with 256 KB a pair: 0.5 GB of payload, but 16 GB where every link has room for every token."""
    args = cli.build_parser().parse_args(["grid", "--sizes", "262144"])
    monkeypatch.setattr(cases.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=12 << 30))
    with pytest.raises(InputError, match=r"need about 169\d\d MiB"):
        cases.require_memory(cases.make_case(32, 32, 262144, args), 1)


def test_a_peer_that_fails_is_a_row_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = runs.start_python

    def start(case: Any, name: str, plan: Any) -> Any:
        if name == "gloo":
            raise runs.RunFailed("process 0: it did not work\nmore")
        return real(case, name, plan)

    monkeypatch.setattr(runs, "start_python", start)
    words = ("latency", *TINY, "--sizes", "1024", "--baselines", "gloo")
    rows = run(capsys, tmp_path / "f.json", *words)["rows"]
    assert [row["reason"] for row in rows if row["contender"] == "gloo"] == ["failed: process 0: it did not work"]
    assert {row["boundary"] for row in rows if row["contender"] == "m2n"} == {"cpp", "python"}
