# SPDX-License-Identifier: Apache-2.0
"""Compares a run with transformers, which reads the same files by code of its own: token ids of prompts, first logits,
greedy tokens. The monolithic model shares its loader and tokenizer with the run, and would share their mistakes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

from .checkpoint import Checkpoint
from .errors import brief
from .monolithic import MonolithicModel
from .result import RunResult
from .run_config import free_bytes

# Both sum in float32, in another order each. Of two tokens whose logits are nearer than TIE either one is right.
LOGIT_TOLERANCE = 1e-3  # times the largest logit, where that is above 1
TIE = 1e-3
MOST_PROMPTS = 8  # whose logits are compared; token ids are of all prompts
MOST_TOKENS = 32  # of each answer


@dataclass
class Comparison:
    """What was compared, and what was found; each difference is one line."""

    version: str = ""  # of transformers; "": it is not installed
    why_not: str = ""  # why nothing, or no more, was compared
    prompts: int = 0  # whose token ids were compared
    logits: int = 0  # prompts whose first logits were compared
    largest_difference: float = 0.0  # of a logit
    tokens: int = 0  # of answers
    ties: int = 0  # answers that go on with another token which is as good
    differences: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person."""
        if not self.prompts:
            return [f"verify: not compared with transformers: {self.why_not}"]
        if self.differences:
            return [f"verify: transformers {self.version} differs: {line}" for line in self.differences]
        parts = [f"token ids of {self.prompts} prompts"]
        if self.logits:
            parts.append(f"first logits of {self.logits} (largest difference {self.largest_difference:.1e})")
            parts.append(f"{self.tokens} tokens")
        ties = f", {self.ties} times another one that is as good" if self.ties else ""
        only = f"; no more: {self.why_not}" if self.why_not else ""
        return [f"verify: equal to transformers {self.version}: {', '.join(parts)}{ties}{only}"]


def compare(result: RunResult, texts: list[str]) -> Comparison:
    """Compares with transformers what can be; `texts`: of the prompts."""
    report = Comparison()
    try:
        import transformers
    except ImportError:
        report.why_not = "transformers is not installed (pip install transformers)"
        return report
    report.version = transformers.__version__
    try:
        with _quiet(transformers):
            _compare_ids(result, texts, report)
            report.why_not = _why_no_logits(result)
            if not report.why_not:
                _compare_tokens(result, report)
    except Exception as error:  # of another library, about a file that this one has read
        report.why_not = f"transformers {report.version} cannot: {type(error).__name__}: {brief(error)}"
    return report


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Without its progress bars and advice, which are for other commands."""
    log = transformers.utils.logging
    level, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if has_bars:
            log.enable_progress_bar()


def _compare_ids(result: RunResult, texts: list[str], report: Comparison) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.run.checkpoint)
    for idx, (text, ours) in enumerate(zip(texts, result.prompts)):
        theirs = tokenizer(text)["input_ids"]
        report.prompts += 1
        if list(theirs) != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
            report.differences.append(
                f"prompt {idx} has ids {brief(theirs[at : at + 4])} from place {at} on, not {brief(ours[at : at + 4])}"
            )


def _why_no_logits(result: RunResult) -> str:
    """Why there can be no second model beside the first; "" if there can."""
    run = result.run
    if run.dtype != "float32" or run.dispatch_dtype is not None:
        return f"logits and tokens are compared in float32, and this run computes in {run.dispatch_dtype or run.dtype}"
    needed = 2 * sum(4 * math.prod(entry.shape) for entry in Checkpoint(run.checkpoint).entries.values())
    free = free_bytes()
    if needed > free:
        return f"two copies of the weights in float32 take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return ""


def _compare_tokens(result: RunResult, report: Comparison) -> None:
    """First logits by the monolithic model; then, where the run was greedy, its tokens by generate()."""
    import torch
    from transformers import AutoModelForCausalLM

    run = result.run
    ours = MonolithicModel(run.checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=torch.float32).eval()
    for idx, (prompt, answer) in enumerate(zip(result.prompts[:MOST_PROMPTS], result.answers)):
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        with torch.no_grad():
            logits_V = theirs(**given).logits[0, -1].float()
        difference, largest = float((logits_V - ours.logits(prompt)).abs().max()), float(logits_V.abs().max())
        report.logits += 1
        report.largest_difference = max(report.largest_difference, difference)
        if not difference <= LOGIT_TOLERANCE * max(1.0, largest):
            report.differences.append(f"prompt {idx}: its first logits differ by up to {difference:.3g}")
        elif run.sampling.is_greedy:
            most = min(MOST_TOKENS, run.max_new_tokens, ours.config.context - len(prompt))
            _compare_answer(idx, answer[:most], most, theirs, given, run.ignore_eos, report)


def _compare_answer(
    idx: int, answer: list[int], most: int, theirs: Any, given: dict[str, Any], ignore_eos: bool, report: Comparison
) -> None:
    import torch

    options = {"eos_token_id": None} if ignore_eos else {}
    with torch.no_grad():
        out = theirs.generate(
            **given, **options, max_new_tokens=most, do_sample=False, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = out.sequences[0, given["input_ids"].shape[1] :].tolist()
    report.tokens += len(expected)
    at = next((i for i, (a, b) in enumerate(zip(expected, answer)) if a != b), None)
    if at is not None and float(out.scores[at][0, expected[at]] - out.scores[at][0, answer[at]]) < TIE:
        report.ties += 1
    elif at is not None:
        report.differences.append(
            f"prompt {idx}: token {at} of its answer is {expected[at]} there, and {answer[at]} here"
        )
    elif len(expected) != len(answer):
        report.differences.append(
            f"prompt {idx}: its answer ends there after {len(expected)} tokens, and here after {len(answer)}"
        )
