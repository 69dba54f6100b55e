# SPDX-License-Identifier: Apache-2.0
"""Verify a disaggregated run: the monolithic model on the same prompts, and where its tokens differ."""

from __future__ import annotations

from typing import Any

from ..engine.monolithic import MonolithicModel
from ..run_config import ATTENTION, EXPERT, RunConfig
from .result import RunResult


def verify(result: RunResult) -> dict[str, Any]:
    """Run the monolithic model, on the run's devices, with the arithmetic of its expert ranks, and compare all tokens.

    Returns {"identical": bool, "tokens": int, "differences": [...]}: of each sequence its first difference,
    {sequence, position, expected, got, logit_gap}; the gap is how much the monolithic model prefers its own
    token there.
    """
    run = result.run
    model = MonolithicModel(run.checkpoint, run.torch_dtype, run.torch_device(ATTENTION), run.torch_device(EXPERT))
    expected = model.generate(
        result.prompts,
        run.max_new_tokens,
        run.sampling,
        max_batch=run.max_batch,
        max_tokens=run.max_tokens,
        groups=run.expert_groups(model.config),
        reduce_at=run.reduce_at,
        dispatch_dtype=run.dispatch_dtype,
        ignore_eos=run.ignore_eos,
    )
    differences = []
    for idx, (theirs, ours) in enumerate(zip(expected, result.answers)):
        if theirs != ours:
            differences.append(_first_difference(model, idx, result.prompts[idx], theirs, ours, run))
    num_tokens = sum(len(answer) for answer in expected)
    return {"identical": not differences, "tokens": num_tokens, "differences": differences}


def _first_difference(
    model: MonolithicModel, idx: int, prompt: list[int], expected: list[int], got: list[int], run: RunConfig
) -> dict[str, Any]:
    shorter = min(len(expected), len(got))
    at = next((i for i in range(shorter) if expected[i] != got[i]), shorter)
    about: dict[str, Any] = {"sequence": idx, "position": at, "expected": None, "got": None, "logit_gap": None}
    if at < shorter:
        logits = model.logits(prompt + expected[:at], run.max_tokens, run.dispatch_dtype)
        gap = float(logits[expected[at]] - logits[got[at]])
        about.update(expected=expected[at], got=got[at], logit_gap=gap)
    return about


def describe(report: dict[str, Any]) -> list[str]:
    """The report in lines."""
    if report["identical"]:
        return [f"verify: all {report['tokens']} tokens equal those of the monolithic model"]
    lines = [f"verify: {len(report['differences'])} sequences differ from the monolithic model"]
    for about in report["differences"]:
        where = f"  sequence {about['sequence']}, token {about['position']}"
        if about["logit_gap"] is None:
            lines.append(f"{where}: one answer ends here")
        else:
            gap = about["logit_gap"]
            lines.append(f"{where}: expected {about['expected']}, got {about['got']}, logit gap {gap:.3g}")
    return lines
