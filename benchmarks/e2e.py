# SPDX-License-Identifier: Apache-2.0
"""m2n-bench e2e: the reference model with m2n, with the same verbs on gloo, and monolithic; tokens/s and their gaps.

The claim of the paper's figure 13, in the system. All contenders of a case generate the same tokens for the same
sequences, in the same processes, right after each other; that the tokens are equal is checked in every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2n.reference_model.errors import InputError
from m2n.reference_model.tables import print_table

PROGRAM_NEEDS = ("torch", "safetensors", "rich", "numpy")
_CASES = "1x1x1,1x1x2,2x1x2,1x2x2,2x2x2"
_LEAST_STEPS = 4  # the first two are not counted
# Of the model, beside --hidden and --layers. With these T_a is near T_e.
_NUM_EXPERTS, _TOP_K, _NUM_HEADS, _NUM_KV_HEADS = 4, 2, 8, 2
_DESCRIPTION = """The reference model (random weights) with m2n, with the same four verbs on torch.distributed's gloo,
and monolithic: tokens/s and the time between two tokens of a sequence, for several numbers of attention ranks M, expert
ranks N and microbatches m. All contenders of a case have the same sequences and as many cores."""

Answers = dict[int, list[int]]  # tokens by sequence


@dataclass(frozen=True)
class Case:
    """M attention ranks, N expert ranks, m microbatches on each attention rank."""

    m: int
    n: int
    microbatches: int

    @property
    def num_processes(self) -> int:
        """M + N."""
        return self.m + self.n


@dataclass(frozen=True)
class Options:
    """What is measured. sequences: at work at once, over all attention ranks; steps: tokens of each."""

    cases: tuple[Case, ...]
    cores: tuple[int, ...]
    rounds: int = 3
    steps: int = 32
    sequences: int = 48
    hidden: int = 512
    num_layers: int = 4


@dataclass(frozen=True)
class Contender:
    """How a case is run; processes and threads of each."""

    name: str
    processes: int
    threads: int = 1

    @property
    def label(self) -> str:
        """For the table."""
        return f"{self.name}, {self.processes} x {self.threads}" if self.name == "monolithic" else self.name


def contenders_of(case: Case, num_cores: int) -> list[Contender]:
    """m2n first; monolithic in one process with as many threads as the case has cores, and in as many processes."""
    threads = min(case.num_processes, num_cores)
    ours = [Contender(name, case.num_processes) for name in ("m2n", "gloo")]
    return [*ours, Contender("monolithic", 1, threads), Contender("monolithic", case.num_processes)]


class Bench:
    """The processes of one round, and the model they run."""

    def __init__(self, options: Options, pool: Any, folder: Path, checkpoint: Path) -> None:
        self.options, self.pool, self.folder, self.checkpoint = options, pool, folder, checkpoint
        self._jobs = itertools.count()

    def run(self, case: Case, contender: Contender) -> tuple[Any, Answers]:
        """One run: what was measured (pingpong.Measured), and the tokens."""
        from .pingpong import measured

        jobs_of = self._monolithic if contender.name == "monolithic" else self._ranks
        # A few steps first: whoever has to load weights would begin later than the others.
        self.pool.run(*jobs_of(self._config(case, contender, _LEAST_STEPS), case, contender))
        run = self._config(case, contender, self.options.steps)
        events = list(itertools.chain.from_iterable(self.pool.run(*jobs_of(run, case, contender))))
        return measured(run, events), answers_of(events)

    def _config(self, case: Case, contender: Contender, steps: int) -> Any:
        """The run of a case, or of a monolithic contender: its processes share the sequences as attention ranks do."""
        from m2n.reference_model.run_config import RunConfig

        is_monolithic = contender.name == "monolithic"
        attention_ranks = contender.processes if is_monolithic else case.m
        microbatches = 1 if is_monolithic else case.microbatches
        return RunConfig(
            checkpoint=str(self.checkpoint),
            attention_ranks=attention_ranks,
            expert_ranks=1 if is_monolithic else case.n,
            microbatches=microbatches,
            max_batch=self.options.sequences // attention_ranks,
            max_tokens=self.options.sequences // attention_ranks // microbatches,
            max_new_tokens=steps,
            ignore_eos=True,
            job=f"e2e-{next(self._jobs)}",
            timeout_s=30.0,
            connect_timeout_s=30.0,
        )

    def _cores(self, case: Case) -> tuple[int, ...]:
        """As many as the case has processes, or all."""
        return self.options.cores[: case.num_processes]

    def _ranks(self, run: Any, case: Case, contender: Contender) -> list[Any]:
        from m2n import AttentionComm, ExpertComm

        from .pingpong_ranks import run_one_rank
        from .pool import Job
        from .torch_verbs import TorchAttentionComm, TorchExpertComm

        comms: tuple[Callable[..., Any], Callable[..., Any]] = (AttentionComm, ExpertComm)
        if contender.name == "gloo":
            attention = functools.partial(TorchAttentionComm, attention_ranks=case.m)
            comms = (attention, functools.partial(TorchExpertComm, attention_ranks=case.m))
        store = tempfile.mkdtemp(dir=self.folder)
        return [
            Job(worker, self._cores_of(worker, case), run_one_rank, run, role, rank, store, comms)
            for worker, (role, rank) in enumerate(run.ranks)
        ]

    def _monolithic(self, run: Any, case: Case, contender: Contender) -> list[Any]:
        from .pingpong_ranks import run_monolithic
        from .pool import Job

        if contender.processes == 1:
            return [Job(0, self._cores(case), run_monolithic, run, 0, num_threads=contender.threads)]
        workers = range(contender.processes)
        return [Job(worker, self._cores_of(worker, case), run_monolithic, run, worker) for worker in workers]

    def _cores_of(self, worker: int, case: Case) -> tuple[int, ...]:
        """A core each where there are enough; else all processes on all cores."""
        cores = self._cores(case)
        return cores[worker : worker + 1] if len(cores) == case.num_processes else cores


def answers_of(events: Iterable[Mapping[str, Any]]) -> Answers:
    """The tokens that the events of a run report."""
    answers: Answers = {}
    for event in events:
        for sequence, token_id, _ in event.get("tokens", ()):
            answers.setdefault(sequence, []).append(token_id)
    return answers


def check_answers(case: Case, answers: Mapping[Contender, Answers]) -> None:
    """Float32 and greedy: every contender must draw the tokens of the monolithic model.

    Raises:
        RunFailed: naming the contender and the first sequence that differs.
    """
    from .runs import RunFailed

    expected = next(tokens for contender, tokens in answers.items() if contender.name == "monolithic")
    for contender, tokens in answers.items():
        for sequence in sorted(expected.keys() | tokens.keys()):
            if tokens.get(sequence) != expected.get(sequence):
                raise RunFailed(
                    f"{contender.label} at {case.m} x {case.n}, m = {case.microbatches}: the tokens of sequence "
                    f"{sequence} are not those of the monolithic model"
                )


def run_rounds(options: Options, tick: Callable[[], None]) -> dict[Case, dict[Contender, list[Any]]]:
    """What was measured, round by round; each round has processes of its own.

    Raises:
        WorkerFailed, RunFailed: a rank failed, or tokens differ.
    """
    from .pool import Pool
    from .synthetic import ModelShape, write_checkpoint

    shape = ModelShape(
        options.hidden, options.hidden, options.num_layers, _NUM_EXPERTS, _TOP_K, _NUM_HEADS, _NUM_KV_HEADS
    )
    results: dict[Case, dict[Contender, list[Any]]] = {}
    for case in options.cases:
        results[case] = {contender: [] for contender in contenders_of(case, len(options.cores))}
    with tempfile.TemporaryDirectory(prefix="m2n-e2e-") as name:
        checkpoint = write_checkpoint(Path(name) / "model", shape)
        for number in range(options.rounds):
            with Pool(max(case.num_processes for case in options.cases)) as pool:
                bench = Bench(options, pool, Path(name), checkpoint)
                for case, runs in results.items():
                    contenders = list(runs)
                    turn = number % len(contenders)  # who comes first changes from round to round
                    answers: dict[Contender, Answers] = {}
                    for contender in contenders[turn:] + contenders[:turn]:
                        measured, answers[contender] = bench.run(case, contender)
                        runs[contender].append(measured)
                        tick()
                    check_answers(case, answers)
    return results


def rows_of(options: Options, results: Mapping[Case, Mapping[Contender, Sequence[Any]]]) -> list[dict[str, Any]]:
    """A row per case and contender: medians over the rounds; ratios are medians of each round's own ratio."""
    rows = []
    for case, runs in results.items():
        figures = {contender: [_figures(one) for one in measured] for contender, measured in runs.items()}
        ours = next(values for contender, values in figures.items() if contender.name == "m2n")
        for contender, values in figures.items():
            row: dict[str, Any] = {
                "contender": contender.name, **dataclasses.asdict(case), "processes": contender.processes,
                "threads": contender.threads, "sequences": options.sequences,
                "placement": "pinned" if case.num_processes <= len(options.cores) else "oversubscribed",
            }  # fmt: skip
            for name in values[0]:
                row[name] = round(statistics.median(one[name] for one in values), 3)
            for name in values[0]:
                ratio = statistics.median(one[name] / ours[at][name] for at, one in enumerate(values))
                row[f"{name.removesuffix('_ms')}_over_m2n"] = round(ratio, 3)
            speeds = [round(one["tokens_per_s"], 1) for one in values]
            row |= {"tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds), "rounds": len(values)}
            rows.append(row)
    return rows


def _figures(measured: Any) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(measured.between_tokens_s) * 1e3, (50, 99))
    speed = tokens_per_s(measured.token_times_s.values())
    return {"tokens_per_s": speed, "tbt_p50_ms": float(p50), "tbt_p99_ms": float(p99)}


def tokens_per_s(times_s: Iterable[Sequence[float]]) -> float:
    """Tokens per second while all sequences are at work: from the last one's second token to the first one's last.

    Processes neither begin nor end together. Where they are never all at work, in a run of a few ms, to the end.
    """
    times_s = list(times_s)
    begin = max(each[1] for each in times_s)
    end = min(each[-1] for each in times_s)
    if end <= begin:
        end = max(each[-1] for each in times_s)
    return sum(begin < time <= end for each in times_s for time in each) / (end - begin)


def print_rows(rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    """The table, for people."""
    from rich.table import Table

    table = Table(title="generation: medians over the rounds, and as multiples of m2n's", box=None, header_style="")
    columns = ("M x N, m", "contender", "tokens/s", "min to max", "x m2n", "between tokens p50 ms", "x m2n",
               "p99 ms", "x m2n", "cores")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("contender", "cores") else "right")
    for row in rows:
        label = Contender(row["contender"], row["processes"], row["threads"]).label
        table.add_row(
            f"{row['m']} x {row['n']}, {row['microbatches']}",
            label,
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s_min']:.0f} to {row['tokens_per_s_max']:.0f}",
            f"{row['tokens_per_s_over_m2n']:.2f}",
            f"{row['tbt_p50_ms']:.1f}",
            f"{row['tbt_p50_over_m2n']:.2f}",
            f"{row['tbt_p99_ms']:.1f}",
            f"{row['tbt_p99_over_m2n']:.2f}",
            row["placement"],
        )
    print_table(console, table)
    console.print("monolithic, P x T: P processes with T threads. All tokens equal those of the monolithic model.")


def add_parser(commands: Any) -> None:
    """The command and its options."""
    text = "the reference model with m2n, with gloo, and monolithic"
    parser = commands.add_parser("e2e", help=text, description=_DESCRIPTION)
    add = parser.add_argument
    add("--cases", default=_CASES, metavar="MxNxm,...", help="numbers of ranks and microbatches (default %(default)s)")
    add("--rounds", type=int, default=3, help="each in processes of its own (default 3)")
    add("--steps", type=int, default=32, help="tokens of each sequence in a run (default 32)")
    add("--sequences", type=int, default=48, help="at work at once, over all attention ranks (default 48)")
    add("--hidden", type=int, default=512, help="of the model (default 512; a multiple of 16)")
    add("--layers", type=int, default=4, help="of the model (default 4)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    parser.set_defaults(run=run, needs=PROGRAM_NEEDS)


def parse_cases(text: str) -> tuple[Case, ...]:
    """As in "1x1x2,2x2x2".

    Raises:
        InputError: naming the option.
    """
    expected = f"--cases: expected MxNxm as in 1x1x2,2x2x2, each once, got {text!r}"
    try:
        cases = [Case(*(int(number) for number in word.split("x"))) for word in text.split(",")]
    except (ValueError, TypeError):
        raise InputError(expected) from None
    if len(set(cases)) < len(cases) or any(min(dataclasses.astuple(case)) < 1 for case in cases):
        raise InputError(expected)
    return tuple(cases)


def options_of(args: argparse.Namespace) -> Options:
    """The options, checked before any process starts.

    Raises:
        InputError: naming the option.
    """
    import torch.distributed as dist

    import m2n

    cases, sequences = parse_cases(args.cases), args.sequences
    checks = [
        (dist.is_available() and dist.is_gloo_available(), "this torch has no gloo"),
        (not os.environ.get("M2N_FAULTS"), "M2N_FAULTS is set: only m2n would be slow; unset it"),
        (args.rounds >= 1, f"--rounds: expected at least 1, got {args.rounds}"),
        (args.steps >= _LEAST_STEPS, f"--steps: expected at least {_LEAST_STEPS}, got {args.steps}"),
        (sequences >= 1, f"--sequences: expected at least 1, got {sequences}"),
        (args.layers >= 1, f"--layers: expected at least 1, got {args.layers}"),
        (args.hidden >= 16 and args.hidden % 16 == 0, f"--hidden: expected a multiple of 16, got {args.hidden}"),
    ]
    for case in cases:
        parts, named = case.m * case.microbatches, f"--cases: {case.m}x{case.n}x{case.microbatches}"
        whole = sequences % parts == 0 and sequences % case.num_processes == 0
        checks += [
            (case.n <= _NUM_EXPERTS, f"{named}: the model has {_NUM_EXPERTS} experts"),
            (whole, f"{named}: {sequences} sequences are to be split into {parts} and {case.num_processes} equal "
                    "parts; choose --sequences"),
        ]  # fmt: skip
        try:
            m2n.Shape(args.hidden, _NUM_EXPERTS, _TOP_K, max(1, sequences // parts), case.microbatches)
        except ValueError as error:
            raise InputError(f"{named}: {error}") from error
    for is_fine, text in checks:
        if not is_fine:
            raise InputError(text)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Options(cases, cores, args.rounds, args.steps, sequences, args.hidden, args.layers)


def run(args: argparse.Namespace, command: str) -> None:
    """Measures, prints, writes."""
    from rich.console import Console
    from rich.progress import Progress

    from m2n.reference_model.timeline import check_writable

    from .machine import machine
    from .report import write_json

    options = options_of(args)
    if args.json is not None:
        check_writable(args.json)
    num_runs = options.rounds * sum(len(contenders_of(case, len(options.cores))) for case in options.cases)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("generating", total=num_runs)
        rows = rows_of(options, run_rounds(options, lambda: progress.advance(task)))
    print_rows(rows, Console(highlight=False, width=None if sys.stdout.isatty() else 132))
    if args.json is not None:
        about = {"machine": machine(), "command": command, "options": dataclasses.asdict(options), "rows": rows}
        write_json(args.json, about)
