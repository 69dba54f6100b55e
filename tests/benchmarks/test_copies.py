# SPDX-License-Identifier: Apache-2.0
"""`m2n-bench copies`: one copy each way by two counts that agree, and a copy too many is found."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from m2n.benchmarks.exchange import copies
from m2n.benchmarks.harness.runs import RunFailed
from m2n.reference_model.errors import InputError

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def run(*words: str, path: Path | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser()
    copies.add_parser(parser.add_subparsers(dest="benchmark"))
    to = [] if path is None else ["--json", str(path)]
    args = parser.parse_args(["copies", "--sizes", "8192", "--rounds", "4", *words, *to])
    args.run(args, "m2n-bench copies")
    return [] if path is None else json.loads(path.read_text())["rows"]


@needs_compiler
@pytest.mark.parametrize("n", ["1", "4"])
def test_rows_are_written_once_and_read_where_they_lie(tmp_path: Path, n: str) -> None:
    rows = run("--expert-ranks", n, path=tmp_path / "rows.json")
    found = {(row["contender"], row["verb"]): row for row in rows}
    ours = {verb: row for (contender, verb), row in found.items() if contender == "m2n"}
    assert set(ours) == {*copies.EXPECTED, "combine_recv"}
    for verb, row in ours.items():
        assert row["agrees"]
        assert row["kernel_bytes"] == 0
        assert row["copies_per_byte"] == copies.EXPECTED.get(verb, row["copies_per_byte"])
    assert ours["dispatch_send"]["memcpy_bytes"] == ours["dispatch_send"]["payload_bytes"] == 4 * int(n) * 8192
    assert ours["dispatch_recv"]["memcpy_bytes"] == ours["dispatch_recv"]["outside_window"] == 0
    assert found["unix-socket", "dispatch_send"]["copies_per_byte"] == 2.0  # gathered, written
    assert found["unix-socket", "dispatch_recv"]["copies_per_byte"] == 1.0  # read


@needs_compiler
@pytest.mark.parametrize(("side", "verb"), [("attention", "dispatch_send"), ("expert", "dispatch_recv")])
def test_one_copy_more_is_found(tmp_path: Path, side: str, verb: str) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(RunFailed, match=f"{verb} at 8 KB: [0-9]+ bytes in calls"):
        run("--extra-copy", side, path=path)
    rows = json.loads(path.read_text())["rows"]
    assert [row["verb"] for row in rows if row.get("agrees") is False] == [verb]


def test_rows_outside_the_window_are_found() -> None:
    row = {
        "contender": "m2n", "verb": "dispatch_recv", "payload_bytes": 4096, "counted_bytes": 0, "memcpy_bytes": 0,
        "kernel_bytes": 0, "outside_window": 2,
    }  # fmt: skip
    assert not copies.judge(row)["agrees"]
    assert copies.describe(row) == "2 rows at dispatch_recv do not lie in the window"


def test_without_a_compiler_our_own_counters_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies.shutil, "which", lambda name: None)
    rows = run(path=tmp_path / "rows.json")
    assert "no C compiler" in rows[-1]["reason"]
    sent = next(row for row in rows if row.get("verb") == "dispatch_send" and row["contender"] == "m2n")
    assert sent["agrees"] and sent["copies_per_byte"] == 1.0
    assert "memcpy_bytes" not in sent


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sizes", "3000"], "--sizes: expected whole rows of 2048 bytes"),
        (["--sizes", "8192,x"], "--sizes: expected whole numbers"),
        (["--rounds", "1"], "--rounds: expected at least 2"),
        (["--expert-ranks", "3"], "--expert-ranks: expected 1, 2, 4 or 8"),
        (["--json", "/nowhere/rows.json"], "/nowhere"),
    ],
)
def test_bad_input_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(*words)
