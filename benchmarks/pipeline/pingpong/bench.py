# SPDX-License-Identifier: Apache-2.0
"""The ping-pong ablation: what m microbatches gain on a network of a given T_c, measured and simulated.

One attention and one expert process on a core each; the network is slow because signals are held back (m2n.Faults).
benchmarks/README.md explains every number. The paper's figure 14 has its counterpart here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2n.reference_model import trace
from m2n.reference_model.report.simulate import Pipeline, simulate
from m2n.reference_model.report.summary import summarise
from m2n.reference_model.run.result import RunResult
from m2n.reference_model.run_config import ATTENTION, EXPERT, RunConfig
from m2n.reference_model.trace import Trace

from ...harness.pool import Job, Pool
from ...harness.synthetic import ModelShape, write_checkpoint
from .ranks import prompts_of, run_monolithic, run_one_rank, time_attention, time_experts

MICROBATCHES = (1, 2, 3, 4)
TABLES = FIXED_MICROBATCH, FIXED_GLOBAL_BATCH = "fixed_microbatch", "fixed_global_batch"
# The first steps of a run are not counted: caches and branch predictors are cold, the pipeline fills.
_WARM_UP_STEPS = 2
_ALONE_S = 0.4  # of timing one side
_NUM_SAMPLES = 400
# A run must have steps that are counted.
LEAST_STEPS = _WARM_UP_STEPS + 2


@dataclass(frozen=True)
class Options:
    """What is measured. ratios: T_c/T_f; sequences: of one microbatch where its size is fixed."""

    cores: tuple[int, int]
    rounds: int = 5
    steps: int = 24
    sequences: int = 24
    ratios: tuple[float, ...] = (0.0, 0.1, 0.28, 0.38, 0.8)
    hidden: int = 512
    num_layers: int = 4
    least_t_f_ms: float = 2.0

    @property
    def sizes(self) -> dict[tuple[str, int], int]:
        """Sequences of a microbatch by (table, m). The global batch is that of m = 2 at the fixed size."""
        whole = 2 * self.sequences
        fixed = {(FIXED_MICROBATCH, m): self.sequences for m in MICROBATCHES}
        return {**fixed, **{(FIXED_GLOBAL_BATCH, m): max(1, whole // m) for m in MICROBATCHES}}


@dataclass(frozen=True)
class Times:
    """Samples of T_a, T_e and the time between two steps, in seconds."""

    t_a: list[float]
    t_e: list[float]
    t_step: list[float]

    @property
    def t_f(self) -> float:
        return max(statistics.median(self.t_a), statistics.median(self.t_e))


@dataclass
class Measured:
    """One run: when each sequence got its tokens, and what the traces say."""

    token_times_s: dict[int, list[float]]  # by sequence, from the begin of the run
    pipeline: dict[str, Any]
    traces: list[Trace]

    @property
    def tokens_per_s(self) -> float:
        return per_s(self.token_times_s)

    @property
    def between_tokens_s(self) -> list[float]:
        times = self.token_times_s.values()
        return [b - a for each in times for a, b in itertools.pairwise(each[_WARM_UP_STEPS - 1 :])]

    @property
    def first_token_s(self) -> list[float]:
        return [each[0] for each in self.token_times_s.values()]


def per_s(times_s: Mapping[Any, Sequence[float]]) -> float:
    """How many of these times there are per second, after the warm-up. The same for measured and simulated runs."""
    begin = max(each[_WARM_UP_STEPS - 1] for each in times_s.values())
    counted = [time for each in times_s.values() for time in each if time > begin]
    return len(counted) / (max(counted) - begin)


def measured(run: RunConfig, events: Iterable[Mapping[str, Any]]) -> Measured:
    """What the events of all ranks of a run say."""
    result = RunResult(run, prompts_of(run))
    drawn: dict[int, list[list[Any]]] = {}  # by attention rank: what each step of a microbatch drew
    for event in events:
        # All ranks are on this machine and read one clock; across a link they only estimate that it is one.
        result.add({**event, "clocks": {}}, now=0.0)
        if event["event"] == "tokens":
            drawn.setdefault(event["rank"], []).append(event["tokens"])
    begin_ns, times_ns = [], {}
    for one in (each for each in result.traces if each.role == ATTENTION):
        begin_ns.append(int(one.of_kind(trace.EMBED)[0, trace.FIELDS.index("begin_ns")]))
        # Every prompt is one token, so every step draws; its tokens are there when its sample event ends.
        for end_ns, tokens in zip(one.of_kind(trace.SAMPLE)[:, trace.FIELDS.index("end_ns")].tolist(), drawn[one.rank]):
            for sequence, *_ in tokens:
                times_ns.setdefault(sequence, []).append(end_ns)
    times_s = {sequence: [(time - min(begin_ns)) / 1e9 for time in each] for sequence, each in times_ns.items()}
    held = [about for about in result.ranks if about["signals_held"]]
    held_us = sum(about["held_us"] for about in held) / max(1, sum(about["signals_held"] for about in held))
    pipeline = summarise(result.traces, run.microbatches, held_us=held_us)
    return Measured(times_s, {**pipeline, "held_us": held_us}, result.traces)


class Bench:
    """The processes of one round, and the model they run."""

    def __init__(self, options: Options, pool: Pool, folder: Path, checkpoint: Path) -> None:
        self.options, self.pool, self.folder, self.checkpoint = options, pool, folder, checkpoint
        self._jobs = itertools.count()

    def config(self, microbatches: int, sequences: int, **more: Any) -> RunConfig:
        """A run of microbatches x sequences on each attention rank."""
        return RunConfig(
            checkpoint=str(self.checkpoint),
            microbatches=microbatches,
            max_batch=microbatches * sequences,
            max_tokens=max(sequences, 1),
            max_new_tokens=self.options.steps,
            ignore_eos=True,
            job=f"pingpong-{next(self._jobs)}",
            timeout_s=30.0,
            connect_timeout_s=30.0,
            **more,
        )

    def run(self, run: RunConfig) -> Measured:
        """Attention ranks on the first core, expert ranks on the second; with several of each, all on both."""
        is_pinned = len(run.ranks) == 2
        cores = {ATTENTION: self.options.cores[:1], EXPERT: self.options.cores[1:]}
        store = tempfile.mkdtemp(dir=self.folder)
        jobs = []
        for worker, (role, rank) in enumerate(run.ranks):
            mine = cores[role] if is_pinned else self.options.cores
            jobs.append(Job(worker, mine, run_one_rank, run, role, rank, store))
        return measured(run, itertools.chain.from_iterable(self.pool.run(*jobs)))

    def times(self, sequences: int, pause_s: float | None = None) -> Times:
        """Both sides at once, each always busy on its core; or one after the other, with such a pause at each layer."""
        run = self.config(1, sequences)
        together = pause_s is None
        jobs = [
            Job(0, self.options.cores[:1], time_attention, run, _ALONE_S, pause_s or 0.0),
            Job(1, self.options.cores[1:], time_experts, run, _ALONE_S, pause_s or 0.0),
        ]
        if together:
            (t_a, t_step), t_e = self.pool.run(*jobs)
        else:
            ((t_a, t_step),), (t_e,) = self.pool.run(jobs[0]), self.pool.run(jobs[1])
        return Times(*(each[-_NUM_SAMPLES:] for each in (t_a, t_e, t_step)))

    def deployments(self) -> dict[str, Callable[[], Measured]]:
        """Other ways to use the two cores, with one global batch."""
        whole, cores = 2 * self.options.sequences, self.options.cores

        def monolithic(num_processes: int) -> Measured:
            run = self.config(1, whole // num_processes, attention_ranks=num_processes)
            jobs = [
                Job(worker, cores if num_processes == 1 else [cores[worker]], run_monolithic, run, worker,
                    num_threads=2 // num_processes)
                for worker in range(num_processes)
            ]  # fmt: skip
            return measured(run, itertools.chain.from_iterable(self.pool.run(*jobs)))

        def disaggregated(num_ranks: int, microbatches: int) -> Measured:
            sequences = max(1, whole // num_ranks // microbatches)
            return self.run(self.config(microbatches, sequences, attention_ranks=num_ranks, expert_ranks=num_ranks))

        return {
            "monolithic, 1 process with 2 threads": lambda: monolithic(1),
            "monolithic, 2 processes with 1 thread": lambda: monolithic(2),
            "1 attention + 1 expert rank, m = 2": lambda: disaggregated(1, 2),
            "1 attention + 1 expert rank, m = 3": lambda: disaggregated(1, 3),
            "2 attention + 2 expert ranks, m = 2 (4 processes on 2 cores)": lambda: disaggregated(2, 2),
        }


def choose_model(options: Options, pool: Pool, folder: Path) -> tuple[Options, ModelShape, Path]:
    """Choose the experts' width so that T_e is near T_a, and enough sequences that T_f is long enough.

    Returns the options with the number of sequences, the shape and the checkpoint.
    """
    inner = options.hidden
    for number in range(6):
        shape = ModelShape(options.hidden, inner, options.num_layers, 4, 2, 8, 2)
        checkpoint = write_checkpoint(folder / f"model-{number}", shape)
        times = Bench(options, pool, folder, checkpoint).times(options.sequences)
        t_a, t_e = statistics.median(times.t_a), statistics.median(times.t_e)
        if t_a * 1e3 < options.least_t_f_ms:
            more = int(options.sequences * options.least_t_f_ms / (t_a * 1e3) * 1.1) + 1
            options = dataclasses.replace(options, sequences=more)
            continue
        better = max(32, round(inner * t_a / t_e / 32) * 32)
        if abs(t_a - t_e) < 0.08 * t_a or better == inner:
            break
        inner = better
    return options, shape, checkpoint


def simulated(
    options: Options, microbatches: int, idle: Times, busy: Times, t_c: float, seed: int
) -> dict[tuple[int, int], list[float]]:
    """Ends of the steps by simulate.py. With one microbatch one core is always idle, with more both are busy."""
    times = idle if microbatches == 1 else busy
    pipeline = Pipeline(
        options.num_layers, microbatches, times.t_a, times.t_e, t_c, times.t_step, steps=options.steps, seed=seed
    )
    return simulate(pipeline).step_ends_s


def one_round(bench: Bench, number: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """All runs once, in processes of their own."""
    options = bench.options
    idle, busy = {}, {}
    for size in sorted(set(options.sizes.values())):
        progress(f"T_a and T_e of {size} sequences")
        busy[size] = bench.times(size)
        # With one microbatch a rank sleeps while the other one computes, and begins its next layer with cold caches.
        idle[size] = bench.times(size, pause_s=busy[size].t_f)
    t_f = busy[options.sequences].t_f
    progress("each side alone")
    alone = bench.times(options.sequences, pause_s=0.0)
    runs: dict[tuple[str, float, int], Measured] = {}
    steps: dict[tuple[str, float, int], float] = {}
    # The machine's speed drifts: runs that are compared come right after each other.
    for table, ratio, m in itertools.product(TABLES, options.ratios, MICROBATCHES):
        size = options.sizes[table, m]
        progress(f"m = {m}, T_c/T_f = {ratio}, {size} sequences")
        runs[table, ratio, m] = bench.run(bench.config(m, size, delay_us=ratio * t_f * 1e6))
    for table, ratio, m in runs:
        size = options.sizes[table, m]
        # T_c as it was where every message was waited for, so that each could be seen.
        t_c = (runs[table, ratio, 1].pipeline["t_c_us"] or ratio * t_f * 1e6) / 1e6
        steps[table, ratio, m] = per_s(simulated(options, m, idle[size], busy[size], t_c, number)) * size
    deployments = {}
    for name, run in bench.deployments().items():
        progress(name)
        deployments[name] = run()
    times = {"idle": idle, "busy": busy, "alone": alone, "t_f": t_f}
    return {**times, "runs": runs, "simulated": steps, "deployments": deployments}


@contextlib.contextmanager
def chosen_model(options: Options, progress: Callable[[str], None]) -> Iterator[tuple[Path, Options, ModelShape, Path]]:
    """(a folder for a while, options as used, the model, its checkpoint in there)."""
    with tempfile.TemporaryDirectory(prefix="m2n-pingpong-") as name:
        with Pool(2) as pool:
            progress("choosing the model")
            chosen = choose_model(options, pool, Path(name))
        yield (Path(name), *chosen)


def run_rounds(options: Options, progress: Callable[[str], None]) -> tuple[Options, ModelShape, list[dict[str, Any]]]:
    """Choose the model, then measure in fresh processes for each round; (options as used, model, rounds)."""
    rounds = []
    with chosen_model(options, progress) as (folder, options, shape, checkpoint):
        for number in range(options.rounds):
            with Pool(4) as pool:
                rounds.append(one_round(Bench(options, pool, folder, checkpoint), number, progress))
    return options, shape, rounds
