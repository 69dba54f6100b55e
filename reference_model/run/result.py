# SPDX-License-Identifier: Apache-2.0
"""RunResult: what the events of all ranks add up to: answers, times, bytes and routes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.routes import write_routes
from ..model.config import ModelConfig
from ..report.summary import summarise
from ..run_config import ATTENTION, RunConfig
from ..trace import Trace, on_one_clock

# What a summary and a trace say of the run.
SETTINGS = (
    "attention_ranks",
    "expert_ranks",
    "attention_device",
    "expert_device",
    "attention_threads",
    "expert_threads",
    "is_one_process",
    "microbatches",
    "dtype",
    "dispatch_dtype",
    "reduce_at",
    "checkpoint",
)


@dataclass
class RunResult:
    """Filled by `add`, one event at a time."""

    run: RunConfig
    prompts: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)
    finishes: list[str | None] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    clocks: dict[int, dict[int, int]] = field(default_factory=dict)  # see on_one_clock()
    num_ready: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.prompts]
        self.finishes = [None for _ in self.prompts]

    def add(self, event: Mapping[str, Any], now: float | None = None) -> None:
        """Take an event of a rank, with its role and rank."""
        now = time.perf_counter() if now is None else now
        if event["event"] == "ready" and event["role"] == ATTENTION:
            # The clock runs from the first attention rank that can begin: loading is not generating.
            self.started_at = now if self.num_ready == 0 else self.started_at
            self.num_ready += 1
        elif event["event"] == "tokens":
            for idx, token_id, finish in event["tokens"]:
                self.answers[idx].append(token_id)
                self.finishes[idx] = finish
            self.ended_at = now
        elif event["event"] == "routes":
            self.routes.append(event["routes"])
        elif event["event"] == "trace":
            self.traces.append(Trace.decode(event["role"], event["rank"], event["trace"]))
            if event["role"] == ATTENTION:
                clocks = event.get("clocks", {})  # as JSON has them: by rank, in text
                self.clocks[event["rank"]] = {int(rank): ahead_ns for rank, ahead_ns in clocks.items()}
        elif event["event"] == "done":
            self.ranks.append({"role": event["role"], "rank": event["rank"], **event["stats"]})
            if len(self.ranks) == len(self.run.ranks):
                self.traces = on_one_clock(self.traces, self.clocks)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """Counts, seconds and bytes, per run and per rank; "pipeline" is described in pipeline.py."""
        seconds = max(self.ended_at - self.started_at, 1e-9)
        order = {role_rank: idx for idx, role_rank in enumerate(self.run.ranks)}
        ranks = sorted(self.ranks, key=lambda about: order[about["role"], about["rank"]])
        return {
            "sequences": len(self.prompts),
            "prompt_tokens": sum(len(prompt) for prompt in self.prompts),
            "tokens": self.num_tokens,
            "seconds": round(seconds, 6),
            "tokens_per_s": round(self.num_tokens / seconds, 3),
            "bytes_moved": sum(about["bytes_sent"] for about in ranks),
            **{name: getattr(self.run, name) for name in SETTINGS},
            "pipeline": self._pipeline(ranks),
            "ranks": [
                {key: round(value, 6) if isinstance(value, float) else value for key, value in about.items()}
                for about in ranks
            ],
        }

    def _pipeline(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        num_held = sum(about["signals_held"] for about in ranks)
        held_us = sum(about["held_us"] for about in ranks) / num_held if num_held else 0.0
        return summarise(self.traces, self.run.microbatches, held_us=held_us)

    def write_routes(self, path: str, config: ModelConfig) -> int:
        """Write the recorded routes of all attention ranks; the format is described in routes.py."""
        scalars = {
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "num_layers": config.num_layers,
            "attention_ranks": self.run.attention_ranks,
            "expert_ranks": self.run.expert_ranks,
            "microbatches": self.run.microbatches,
        }
        return write_routes(path, self.routes, scalars)
