# SPDX-License-Identifier: Apache-2.0
"""m2n-bench pingpong --links: what m microbatches gain where attention and experts are a shaped link apart.

Each side runs in a network namespace; rows go over TCP. benchmarks/README.md explains every number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2n.reference_model import trace
from m2n.reference_model.errors import InputError
from m2n.reference_model.report.simulate import Pipeline, simulate
from m2n.reference_model.report.summary import samples_ns
from m2n.reference_model.run_config import ATTENTION

from ...harness import link_probe
from ...harness.hosts import Hosts, why_no_links
from ...harness.links import Link
from ...harness.pool import Job, Pool
from ...harness.synthetic import ModelShape
from .bench import MICROBATCHES, Bench, Measured, Options, Times, chosen_model, per_s, simulated

_FLOAT_BYTES = 4  # rows travel as float32
_BULK_S = 0.6


@dataclass
class OneLink:
    """What one round says of one link."""

    number: int  # of the round
    link: Link
    probe: dict[str, float]
    idle: Times
    busy: Times
    runs: dict[int, Measured]  # by m
    relay_share: float  # of a core, while the runs were going on

    @property
    def t_c(self) -> float:
        """One way in seconds, as the run with m = 1 saw it: there every message is waited for."""
        return float(self.runs[1].pipeline["t_c_us"] or self.link.delay_us) / 1e6

    def measured(self, options: Options, m: int) -> float:
        """Tokens/s."""
        return self.runs[m].tokens_per_s

    def simulated(self, options: Options, m: int) -> float:
        """Tokens/s that the simulator expects from T_a and T_e as timed apart, and T_c."""
        return per_s(simulated(options, m, self.idle, self.busy, self.t_c, self.number)) * options.sequences

    def from_traces(self, options: Options, m: int) -> float:
        """The same from the times of this very run, verbs included, and so what the network takes of the cores."""
        traces = self.runs[m].traces
        t_a, t_e = ((samples / 1e9).tolist() for samples in samples_ns(traces))
        (attention,) = (one for one in traces if one.role == ATTENTION)
        between = np.concatenate([attention.of_kind(kind) for kind in (trace.EMBED, trace.SAMPLE)])
        between_ns = np.diff(between[:, [trace.FIELDS.index(name) for name in ("begin_ns", "end_ns")]]).sum()
        t_step = float(between_ns) / 1e9 / len(attention.of_kind(trace.SAMPLE))
        pipeline = Pipeline(options.num_layers, m, t_a, t_e, self.t_c, t_step, steps=options.steps, seed=self.number)
        return per_s(simulate(pipeline).step_ends_s) * options.sequences


def require_links() -> None:
    """Raises InputError where hosts with such a link between them cannot be made."""
    if (reason := why_no_links()) is not None:
        raise InputError(f"--links: {reason}")


def message_bytes(options: Options) -> int:
    """Of a dispatch or a combine of one microbatch, rows alone."""
    return options.sequences * options.hidden * _FLOAT_BYTES


def one_link(options: Options, number: int, link: Link, folder: Path, checkpoint: Path) -> OneLink:
    """All runs over one link once, in processes of their own."""
    with Hosts(2, link) as hosts, Pool(2, [hosts.place(0), hosts.place(1)]) as pool:
        bench = Bench(options, pool, folder, checkpoint)
        # With one microbatch a rank sleeps while the other one computes, and longer on a long link.
        busy = bench.times(options.sequences)
        idle = bench.times(options.sequences, pause_s=busy.t_f + 2 * link.delay_us / 1e6)
        address, size, cores = hosts.address(1), message_bytes(options), options.cores
        probe, bulk_gbit = pool.run(
            Job(0, cores[:1], link_probe.ask, address, size, _BULK_S),
            Job(1, cores[1:], link_probe.answer, address, size),
        )
        began, relay_s = time.perf_counter(), hosts.relay_cpu_s
        runs = {m: bench.run(bench.config(m, options.sequences)) for m in MICROBATCHES}
        relay_share = (hosts.relay_cpu_s - relay_s) / (time.perf_counter() - began)
    return OneLink(number, link, {**probe, "bulk_gbit": bulk_gbit}, idle, busy, runs, relay_share)


def run_rounds(
    options: Options, links: list[Link], progress: Callable[[str], None]
) -> tuple[Options, ModelShape, list[dict[Link, OneLink]]]:
    """Choose the model, then measure every link once a round; (options as used, model, rounds)."""
    rounds = []
    with chosen_model(options, progress) as (folder, options, shape, checkpoint):
        for number in range(options.rounds):
            by_link = {}
            for link in links:
                progress(f"round {number + 1} of {options.rounds}: {link.name}")
                by_link[link] = one_link(options, number, link, folder, checkpoint)
            rounds.append(by_link)
    return options, shape, rounds
