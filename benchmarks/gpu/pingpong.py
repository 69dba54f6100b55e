# SPDX-License-Identifier: Apache-2.0
"""The ping-pong pipeline on one GPU: what m microbatches gain where attention and experts share a device. Part of
`make gpu`; prints lines of JSON.

One attention and one expert rank, each a stream of one process, a synthetic model, microbatches of one size. With one
microbatch the two streams take turns; with more, one may compute while the other waits, if one alone does not fill the
device. Each m is run with launches from the host and with decode rounds in CUDA graphs, in turn, several times. With
`--device emulated` it runs where there is no GPU, in a small form; its times mean nothing then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m2n.benchmarks.harness.synthetic import ModelShape, write_checkpoint
from m2n.reference_model.console.files import check_matplotlib
from m2n.reference_model.report.timeline import draw_timeline
from m2n.reference_model.run.rank import load_rank, run_rank
from m2n.reference_model.run.result import RunResult
from m2n.reference_model.run_config import ATTENTION, EXPERT, RunConfig
from m2n.reference_model.trace import Trace

MICROBATCHES = (1, 2, 3, 4)
# The first steps of a run compile, record and fill the pipeline.
WARM_UP_STEPS = 6
TIMEOUT_S = 60.0


def run_once(run: RunConfig, loaded: dict[str, Any]) -> tuple[list[float], float, list[Trace]]:
    """(seconds between two tokens of a sequence, tokens per second, traces)."""
    prompts = [[1 + idx % 200] for idx in range(run.max_batch)]
    times_s: list[list[float]] = [[] for _ in prompts]
    result, meeting = RunResult(run, prompts), threading.Barrier(len(run.ranks))

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "tokens":
            now = time.perf_counter()
            for sequence, *_ in event["tokens"]:
                times_s[sequence].append(now)
        result.add(event)

    def rank_main(role: str, rank: int) -> None:
        share = dict(enumerate(prompts)) if role == ATTENTION else {}
        try:
            run_rank(run, role, rank, share, store, lambda event: emit({**event, "role": role, "rank": rank}),
                     loaded[role], meet=meeting.wait)  # fmt: skip
        except BaseException:
            meeting.abort()
            raise

    with tempfile.TemporaryDirectory(prefix="m2n-") as store, ThreadPoolExecutor(len(run.ranks)) as pool:
        for future in [pool.submit(rank_main, *rank) for rank in run.ranks]:
            future.result()
    counted = [each[WARM_UP_STEPS - 1 :] for each in times_s]
    began, ended = (edge(each[at] for each in counted) for edge, at in ((min, 0), (max, -1)))
    between_s = [later - earlier for each in counted for earlier, later in itertools.pairwise(each)]
    return between_s, len(between_s) / (ended - began), result.traces


def config_of(options: argparse.Namespace, checkpoint: Path, microbatches: int, is_graph: bool) -> RunConfig:
    return RunConfig(
        checkpoint=str(checkpoint),
        microbatches=microbatches,
        max_batch=microbatches * options.sequences,
        max_tokens=options.sequences,
        max_new_tokens=options.steps,
        dtype="bfloat16",
        ignore_eos=True,
        job=f"gpu-pingpong-{microbatches}-{is_graph}",
        timeout_s=TIMEOUT_S,
        attention_device=options.device,
        expert_device=options.device,
        one_process=True,
        cuda_graphs=is_graph,
    )


def row_of(options: argparse.Namespace, microbatches: int, is_graph: bool, results: list[Any]) -> dict[str, Any]:
    between_us = sorted(1e6 * seconds for between_s, *_ in results for seconds in between_s)
    kind = "in CUDA graphs" if is_graph else "launched"
    return {
        "name": f"decode step, {microbatches} x {options.sequences} sequences, {kind}",
        "bytes": 2 * 2 * options.hidden * options.sequences * microbatches * options.layers,  # to the experts and back
        "samples": len(between_us),
        "p50_us": round(statistics.median(between_us), 3),
        "p99_us": round(between_us[min(len(between_us) - 1, round(0.99 * len(between_us)))], 3),
        "tokens_per_s": round(statistics.median(tokens_per_s for _, tokens_per_s, _ in results), 1),
    }


def measure(options: argparse.Namespace, checkpoint: Path) -> list[dict[str, Any]]:
    """All runs in turn; rows by m, each with its gain over one microbatch of the same kind."""
    kinds = list(itertools.product((False, True), options.microbatches))
    results: dict[tuple[bool, int], list[Any]] = {kind: [] for kind in kinds}
    loaded = {role: load_rank(config_of(options, checkpoint, 1, False), role, 0) for role in (ATTENTION, EXPERT)}
    for _ in range(options.rounds):
        for is_graph, m in kinds:
            began = time.perf_counter()
            results[is_graph, m].append(run_once(config_of(options, checkpoint, m, is_graph), loaded))
            kind = "in CUDA graphs" if is_graph else "launched"
            print(f"m = {m}, {kind}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for is_graph, m in kinds:
        row = row_of(options, m, is_graph, results[is_graph, m])
        base = next((other for (kind, _), other in zip(kinds, rows) if kind == is_graph), row)
        rows.append(row | {"ratio": round(row["tokens_per_s"] / base["tokens_per_s"], 3), "limit": "one microbatch's"})
    if options.timeline is not None:
        m = min(2, max(options.microbatches))
        draw_timeline(options.timeline, results[False, m][-1][2], m)
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--microbatches", type=int, nargs="+", default=list(MICROBATCHES))
    parser.add_argument("--sequences", type=int, default=64, help="of a microbatch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--timeline", type=Path, metavar="FILE.png", help="of two microbatches, launched")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps: more than {WARM_UP_STEPS}, which warm up; got {options.steps}")
    if options.timeline is not None:
        check_matplotlib()
    with tempfile.TemporaryDirectory(prefix="m2n-") as folder:
        shape = ModelShape(options.hidden, options.hidden, options.layers, 8, 2, max(1, options.hidden // 128), 1)
        for row in measure(options, write_checkpoint(Path(folder) / "model", shape)):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
