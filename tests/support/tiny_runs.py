# SPDX-License-Identifier: Apache-2.0
"""Runs of tiny models with their ranks as threads of this process, and the tokens that they must give."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import tiny_checkpoints as tiny

import m2n.testing
from m2n.reference_model.engine.monolithic import MonolithicModel
from m2n.reference_model.model.config import ModelConfig
from m2n.reference_model.run.rank import load_decoder, load_experts, run_attention, run_expert, run_rank
from m2n.reference_model.run.result import RunResult
from m2n.reference_model.run_config import ATTENTION, RunConfig

NUM_NEW = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 9},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": {"clip_qkv": 2.0},
}
PROMPTS = tiny.prompts(4, longest=30)
EMULATED = {"attention_device": "emulated", "expert_device": "emulated"}


@functools.cache
def checkpoint_and_tokens(root: Path, family: str, num_experts: int) -> tuple[Path, list[list[int]]]:
    """A checkpoint with the greedy tokens that transformers and the monolithic model agree on."""
    model = tiny.make_model(family, num_experts, seed=num_experts, **FAMILIES[family])
    directory = tiny.save(model, root / f"{family}-{num_experts}")
    tokens = [tiny.reference_tokens(model, prompt, NUM_NEW) for prompt in PROMPTS]
    assert MonolithicModel(directory).generate(PROMPTS, NUM_NEW, ignore_eos=True) == tokens
    return directory, tokens


def make_run(directory: Path, num_attention: int, num_experts: int, microbatches: int, **options: Any) -> RunConfig:
    options = {"max_tokens": 16, "max_batch": 2, "max_new_tokens": NUM_NEW, "ignore_eos": True, **options}
    return RunConfig(
        checkpoint=str(directory),
        attention_ranks=num_attention,
        expert_ranks=num_experts,
        microbatches=microbatches,
        timeout_s=30.0,
        **options,
    )


def run_as_threads(run: RunConfig, prompts: list[list[int]]) -> RunResult:
    """The whole run with its ranks as threads of this process."""
    config = ModelConfig.from_directory(run.checkpoint)
    placement, result = run.placement(config), RunResult(run, prompts)

    def rank_main(comm: Any) -> None:
        def emit(event: dict[str, Any]) -> None:
            result.add({**event, "role": comm.role, "rank": comm.rank})

        if comm.role == "attention":
            share = {idx: prompts[idx] for idx in run.share(comm.rank, len(prompts))}
            run_attention(comm, run, load_decoder(run.checkpoint, run.torch_dtype), share, emit)
        else:
            experts = load_experts(run.checkpoint, list(placement.experts_of(comm.rank)), run.torch_dtype)
            run_expert(comm, run, experts, emit)

    m2n.testing.run_ranks(
        rank_main,
        attention=run.attention_ranks,
        experts=run.expert_ranks,
        shape=run.shape(config),
        placement=placement,
        max_peers=4,
        config=run.comm_config,
    )
    return result


def run_on_devices(run: RunConfig, prompts: list[list[int]], store: Path) -> RunResult:
    """As run_as_threads, but each role where the run has it."""
    result, errors, all_loaded = RunResult(run, prompts), [], threading.Barrier(len(run.ranks))

    def rank_main(role: str, rank: int) -> None:
        share = {idx: prompts[idx] for idx in run.share(rank, len(prompts))} if role == ATTENTION else {}
        try:
            run_rank(
                run, role, rank, share, str(store), lambda event: result.add({**event, "role": role, "rank": rank}),
                meet=all_loaded.wait,
            )  # fmt: skip
        except BaseException as error:
            errors.append(error)
            all_loaded.abort()

    threads = [threading.Thread(target=rank_main, args=rank, daemon=True) for rank in run.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return result
