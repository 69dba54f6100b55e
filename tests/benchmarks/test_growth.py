# SPDX-License-Identifier: Apache-2.0
"""`m2n-bench growth`: the line through points, a tiny run, what it refuses."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from m2n.benchmarks.exchange import growth
from m2n.reference_model.errors import InputError

TINY = ["--starts", "1", "--seconds", "0.02", "--bytes", "8192", "--expert-ranks", "1,2", "--row-bytes", "2048,512"]
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    growth.add_parser(parser.add_subparsers(dest="benchmark"))
    args = parser.parse_args(["growth", *TINY, *words])
    args.run(args, "m2n-bench growth")


def test_a_line_is_found_and_how_well_it_fits() -> None:
    slope, at_zero, share = growth.fit([1, 2, 4, 8], [5.0, 7.0, 11.0, 19.0])
    assert (slope, at_zero, share) == pytest.approx((2.0, 3.0, 1.0))
    slope, at_zero, share = growth.fit([0, 1, 2], [1.0, 4.0, 1.0])
    assert (slope, at_zero, share) == pytest.approx((0.0, 2.0, 0.0))
    assert growth.fit([1, 2], [3.0, 3.0]) == (0.0, 3.0, 1.0)
    with pytest.raises(ValueError, match="two different"):
        growth.fit([2, 2], [1.0, 3.0])


def test_slopes_have_the_unit_of_what_grows() -> None:
    rows = [
        {"series": "rows", "contender": "m2n", "direction": "dispatch", "x": x, "p50_us": 5 + 0.006 * x}
        for x in (8, 16, 32)
    ]
    (slope,) = growth.fit_all([*rows, {"series": "rows", "contender": "mpi", "direction": "all", "reason": "none"}])
    assert (slope["slope"], slope["unit"], slope["at_zero_us"], slope["points"]) == (6.0, "ns per row", 5.0, 3)


@needs_two_cores
def test_every_series_has_its_points_and_slopes(tmp_path: Path) -> None:
    run("--idle", "0,3", "--json", str(tmp_path / "growth.json"))
    about = json.loads((tmp_path / "growth.json").read_text())
    assert about["machine"]["cores"] and about["command"] == "m2n-bench growth"
    points = {series: set() for series in ("expert ranks", "expert ranks, one thread", "rows", "idle links")}
    for row in about["rows"]:
        assert row["p50_us"] > 0
        points[row["series"]].add(row["x"])
    assert list(points.values()) == [{1, 2}, {1, 2}, {4, 16}, {0, 3}]
    assert {slope["series"] for slope in about["slopes"]} == set(points)
    assert {row["contender"] for row in about["rows"]} == {"m2n", "memcpy"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--expert-ranks", "1"], "--expert-ranks: a slope needs at least 2 different numbers, got 1"),
        (
            ["--expert-ranks", "1,3"],
            "--expert-ranks: 8192 bytes do not spread over 3 ranks in whole rows of 2048 bytes",
        ),
        (["--row-bytes", "2048,3000"], "--row-bytes: 8192 bytes are no whole rows of 3000 bytes"),
        (["--idle", "0,64"], "--idle: expected 0 to 63 links, got 0 to 64"),
        (["--idle", "0,many"], "--idle: expected whole numbers"),
        (["--starts", "0"], "--starts: expected at least 1"),
        (["--json", "/nowhere/growth.json"], "/nowhere"),
    ],
)
def test_bad_input_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(*words)
