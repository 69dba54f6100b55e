# SPDX-License-Identifier: Apache-2.0
"""m2n-bench balance: how busy attention and expert ranks are before and after ranks and threads are balanced.

One attention and one expert rank whose work is unequal, so that one side idles; then the same work with other numbers
of ranks and threads on the same cores, and which of them generates most.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2n.reference_model.errors import InputError
from m2n.reference_model.tables import print_table

PROGRAM_NEEDS = ("torch", "safetensors", "rich", "numpy")
_ROLES = ("attention", "expert")
_NUM_EXPERTS = 4  # of the model that pingpong.choose_model writes
_LEAST_STEPS = 4  # the first two are not counted
_DESCRIPTION = """The reference model (random weights) whose experts have --expert-work times the work of attention: how
busy both roles are, and tokens/s, with --before and with other numbers of ranks and threads. All settings generate the
same sequences on the same cores; the one with most tokens/s is called after."""


@dataclass(frozen=True)
class Setting:
    """M attention ranks and N expert ranks, and torch's threads on each rank of the role."""

    m: int
    n: int
    attention_threads: int = 1
    expert_threads: int = 1

    @property
    def num_threads(self) -> int:
        """Of all ranks."""
        return self.m * self.attention_threads + self.n * self.expert_threads

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.attention_threads}x{self.expert_threads}"


@dataclass(frozen=True)
class Options:
    """What is measured. sequences: at work at once, over all attention ranks."""

    before: Setting
    settings: tuple[Setting, ...]  # before is the first
    cores: tuple[int, ...]
    rounds: int = 3
    steps: int = 24
    sequences: int = 48
    microbatches: int = 2
    expert_work: float = 2.0
    hidden: int = 512
    num_layers: int = 4


def default_settings(num_cores: int) -> list[Setting]:
    """Up to two ranks a role and two threads a rank, no more threads than cores; on two cores one more."""
    every = itertools.product((1, 2), repeat=4)
    return [each for each in itertools.starmap(Setting, every) if each.num_threads <= max(num_cores, 3)]


def cores_of(setting: Setting, cores: Sequence[int]) -> list[list[int]]:
    """For each rank, attention ranks first: a core for each of its threads, or all where there are too few."""
    threads = [setting.attention_threads] * setting.m + [setting.expert_threads] * setting.n
    if setting.num_threads > len(cores):
        return [list(cores) for _ in threads]
    ends = list(itertools.accumulate(threads))
    return [list(cores[end - count : end]) for end, count in zip(ends, threads)]


def run_rounds(options: Options, progress: Callable[[str], None]) -> tuple[Any, dict[Setting, list[Any]]]:
    """The model, and what was measured (pingpong.Measured), round by round; each round has processes of its own."""
    from . import pingpong
    from .pingpong_ranks import run_one_rank
    from .pool import Job, Pool
    from .synthetic import write_checkpoint

    runs: dict[Setting, list[Any]] = {setting: [] for setting in options.settings}
    with tempfile.TemporaryDirectory(prefix="m2n-balance-") as name:
        folder = Path(name)
        timed = pingpong.Options(
            cores=(options.cores[0], options.cores[1]),
            steps=options.steps,
            sequences=options.sequences // options.microbatches,
            hidden=options.hidden,
            num_layers=options.num_layers,
            least_t_f_ms=0.0,
        )
        with Pool(2) as pool:
            progress("choosing the model")
            _, equal, _ = pingpong.choose_model(timed, pool, folder)
        shape = dataclasses.replace(equal, inner=max(32, round(equal.inner * options.expert_work / 32) * 32))
        checkpoint = write_checkpoint(folder / "model", shape)

        def generate(bench: pingpong.Bench, setting: Setting, steps: int) -> Any:
            run = bench.config(
                options.microbatches,
                options.sequences // (setting.m * options.microbatches),
                attention_ranks=setting.m,
                expert_ranks=setting.n,
                attention_threads=setting.attention_threads,
                expert_threads=setting.expert_threads,
            )
            run, store = dataclasses.replace(run, max_new_tokens=steps), tempfile.mkdtemp(dir=folder)
            placed = zip(run.ranks, cores_of(setting, options.cores))
            jobs = [
                Job(worker, cores, run_one_rank, run, role, rank, store)
                for worker, ((role, rank), cores) in enumerate(placed)
            ]
            return pingpong.measured(run, itertools.chain.from_iterable(bench.pool.run(*jobs)))

        for number in range(options.rounds):
            with Pool(max(setting.m + setting.n for setting in options.settings)) as pool:
                bench = pingpong.Bench(timed, pool, folder, checkpoint)
                for setting in options.settings:
                    progress(f"round {number + 1} of {options.rounds}, {setting}")
                    generate(bench, setting, _LEAST_STEPS)  # whoever loads weights would begin later than the others
                    runs[setting].append(generate(bench, setting, options.steps))
    return shape, runs


def report(options: Options, runs: Mapping[Setting, Sequence[Any]]) -> dict[str, Any]:
    """A row for each setting, medians over the rounds; which was best, and what it gains."""
    rows = [_row(setting, runs[setting], options) for setting in options.settings]
    best = max(options.settings, key=lambda setting: statistics.median(run.tokens_per_s for run in runs[setting]))
    gains = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(runs[best], runs[options.before])]
    return {
        "before": rows[0],
        "after": rows[options.settings.index(best)],
        "gain": round(statistics.median(gains), 3),
        "gain_min_max": [round(min(gains), 3), round(max(gains), 3)],
        # What m2n-generate says after such a run.
        "advice_before": runs[options.before][-1].pipeline["advice"],
        "rows": rows,
    }


def _row(setting: Setting, runs: Sequence[Any], options: Options) -> dict[str, Any]:
    speeds = [run.tokens_per_s for run in runs]
    row: dict[str, Any] = {
        **dataclasses.asdict(setting),
        "cores": "of their own" if setting.num_threads <= len(options.cores) else "shared",
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_min_max": [round(min(speeds), 1), round(max(speeds), 1)],
    }
    for role, share in itertools.product(_ROLES, ("busy", "communicating", "waiting")):
        of_runs = [
            statistics.mean(rank[share] for rank in run.pipeline["ranks"] if rank["role"] == role) for run in runs
        ]
        row[f"{role}_{share}"] = round(statistics.median(of_runs), 4)
    for name in ("t_a_us", "t_e_us"):
        row[name] = round(statistics.median(run.pipeline[name] for run in runs), 1)
    return row


def print_report(about: Mapping[str, Any], console: Any) -> None:
    """The table, for people."""
    from rich.table import Table

    table = Table(title="busy shares and tokens/s, medians over the rounds", box=None, header_style="")
    for column in ("M x N", "threads", "cores", "tokens/s", "attention busy", "expert busy", "T_a us", "T_e us", ""):
        table.add_column(column, justify="left" if column in ("cores", "") else "right")
    for row in about["rows"]:
        table.add_row(
            f"{row['m']} x {row['n']}",
            f"{row['attention_threads']}, {row['expert_threads']}",
            row["cores"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['attention_busy']:.0%}",
            f"{row['expert_busy']:.0%}",
            f"{row['t_a_us']:.0f}",
            f"{row['t_e_us']:.0f}",
            " ".join(name for name in ("before", "after") if about[name] == row),
        )
    print_table(console, table)
    console.print(f"after / before: {about['gain']:.2f} x tokens/s")


def parse_setting(option: str, text: str) -> Setting:
    """As in "1x2" or "1x2x1x3".

    Raises:
        InputError: naming the option.
    """
    try:
        setting = Setting(*(int(number) for number in text.split("x")))
    except (ValueError, TypeError):
        setting = Setting(0, 0)
    if min(dataclasses.astuple(setting)) < 1 or setting.n > _NUM_EXPERTS:
        raise InputError(
            f"{option}: expected MxN or MxNxTxT (attention and expert ranks, threads of each), at most {_NUM_EXPERTS} "
            f"expert ranks, got {text!r}"
        )
    return setting


def options_of(args: argparse.Namespace) -> Options:
    """The options, checked before any process starts.

    Raises:
        InputError: naming the option.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    before = parse_setting("--before", args.before)
    others = default_settings(len(cores))
    if args.settings is not None:
        others = [parse_setting("--settings", text) for text in args.settings.split(",")]
    settings = tuple(dict.fromkeys((before, *others)))
    sequences, m = args.sequences, args.microbatches
    checks = [
        (len(cores) >= 2, f"one attention and one expert rank need a core each; this process may use {len(cores)}"),
        (not os.environ.get("M2N_FAULTS"), "M2N_FAULTS is set, and late signals leave ranks idle; unset it"),
        (args.rounds >= 1, f"--rounds: expected at least 1, got {args.rounds}"),
        (args.steps >= _LEAST_STEPS, f"--steps: expected at least {_LEAST_STEPS}, got {args.steps}"),
        (1 <= m <= 63, f"--microbatches: expected 1 to 63, got {m}"),
        (0.05 <= args.expert_work <= 20, f"--expert-work: expected 0.05 to 20, got {args.expert_work}"),
        (args.layers >= 1, f"--layers: expected at least 1, got {args.layers}"),
        (args.hidden >= 16 and args.hidden % 16 == 0, f"--hidden: expected a multiple of 16, got {args.hidden}"),
    ]
    for is_fine, text in checks:
        if not is_fine:
            raise InputError(text)
    for setting in settings:
        parts = setting.m * m
        if sequences < 1 or sequences % parts:
            raise InputError(f"--sequences: {sequences} cannot be split into the {parts} equal parts of {setting}")
    return Options(
        before, settings, cores, args.rounds, args.steps, sequences, m, args.expert_work, args.hidden, args.layers
    )


def add_parser(commands: Any) -> None:
    """The command and its options."""
    text = "busy shares of attention and experts, before and after ranks and threads are balanced"
    parser = commands.add_parser("balance", help=text, description=_DESCRIPTION)
    add = parser.add_argument
    add("--before", default="1x1x1x1", metavar="MxNxTxT", help="ranks and threads of each role (default %(default)s)")
    add("--settings", metavar="MxNxTxT,...", help="what is tried (default: up to 2 ranks a role and 2 threads a rank)")
    add("--expert-work", type=float, default=2.0, metavar="X", help="T_e over T_a, a thread each, about (default 2)")
    add("--rounds", type=int, default=3, help="each in processes of its own (default 3)")
    add("--steps", type=int, default=24, help="tokens of each sequence in a run (default 24)")
    add("--sequences", type=int, default=48, help="at work at once, over all attention ranks (default 48)")
    add("--microbatches", type=int, default=2, help="of each attention rank (default 2)")
    add("--hidden", type=int, default=512, help="of the model (default 512; a multiple of 16)")
    add("--layers", type=int, default=4, help="of the model (default 4)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    parser.set_defaults(run=run, needs=PROGRAM_NEEDS)


def run(args: argparse.Namespace, command: str) -> None:
    """Measures, prints, writes."""
    from rich.console import Console

    from m2n.reference_model.timeline import check_writable

    from .machine import machine
    from .report import write_json

    options = options_of(args)
    if args.json is not None:
        check_writable(args.json)
    with Console(stderr=True, highlight=False).status("starting") as status:
        shape, runs = run_rounds(options, status.update)
    about = {
        "machine": machine(),
        "command": command,
        "options": {**dataclasses.asdict(options), "settings": [str(setting) for setting in options.settings]},
        "model": dataclasses.asdict(shape),
        **report(options, runs),
    }
    print_report(about, Console(highlight=False, width=None if sys.stdout.isatty() else 132))
    if args.json is not None:
        write_json(args.json, about)
