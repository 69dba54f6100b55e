# SPDX-License-Identifier: Apache-2.0
"""Random tiny checkpoints give the token ids, logits and greedy tokens of transformers (differential.py)."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import differential  # noqa: E402

from m2n.reference_model import against_transformers, generate  # noqa: E402
from m2n.reference_model.against_transformers import compare  # noqa: E402
from m2n.reference_model.checkpoint import Checkpoint  # noqa: E402
from m2n.reference_model.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.result import RunResult  # noqa: E402
from m2n.reference_model.run_config import RunConfig  # noqa: E402
from m2n.reference_model.tokenizer import Tokenizer  # noqa: E402

SHIPPED = generate.DEFAULT_CHECKPOINT


def try_seeds(seeds: list[int]) -> None:
    outcomes = {seed: differential.outcome(seed) for seed in seeds}
    assert not {seed: text for seed, text in outcomes.items() if text.startswith("differs")}
    refused = [text for text in outcomes.values() if text.startswith("refused")]
    assert all("forced_eos_token_id" in text for text in refused) and len(refused) <= len(seeds) // 4, refused


def test_twenty_random_checkpoints_agree_with_transformers() -> None:
    try_seeds(list(range(20)))


@pytest.mark.slow
def test_random_checkpoints_of_fresh_seeds_agree_with_transformers() -> None:
    first = random.SystemRandom().randrange(10**9)
    print(f"python tests/differential.py --first-seed {first} --seeds 60")
    try_seeds(list(range(first, first + 60)))


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loader that takes a tensor of another save, and a tokenizer that cuts."""
    tensor, encode = Checkpoint.tensor, Tokenizer.encode
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, dtype: tensor(self, name, dtype) * 1.01)
    assert "first logits differ" in differential.outcome(1)
    monkeypatch.undo()
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text)[:2])
    assert "has ids" in differential.outcome(1)


OPTIONS = ["--prompt", "And it came to pass", "--max-new-tokens", "6", "--verify"]


def result_of(directory: Path, dtype: str = "float32") -> RunResult:
    """A run of the prompt that needs no processes."""
    run = RunConfig(str(directory), max_new_tokens=6, dtype=dtype)
    result = RunResult(run, [Tokenizer(directory).encode(OPTIONS[1])])
    result.answers = MonolithicModel(directory, run.torch_dtype).generate(result.prompts, 6)
    return result


def test_verify_finds_what_loader_and_run_have_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monolithic model agrees with the run; transformers does not with either."""
    encode, path = Tokenizer.encode, tmp_path / "out.json"
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text)[1:])
    assert generate.main([*OPTIONS, "--json", str(path)]) == 1
    said = capsys.readouterr().err
    assert "equal those of the monolithic model" in said and "differs: prompt 0 has ids" in said
    about = json.loads(path.read_text())["summary"]["verify"]["transformers"]
    assert (about["prompts"], about["logits"], about["tokens"], len(about["differences"])) == (1, 1, 6, 1)


def test_what_was_compared_is_said() -> None:
    report = compare(result_of(SHIPPED), OPTIONS[1:2])
    assert (report.prompts, report.logits, report.tokens, report.ties) == (1, 1, 6, 0)
    assert 0 < report.largest_difference < 1e-3 and not report.differences and not report.why_not
    assert "equal to transformers" in report.lines()[0] and "6 tokens" in report.lines()[0]
    wrong = result_of(SHIPPED)
    wrong.answers[0][3] += 1
    assert "token 3 of its answer" in compare(wrong, OPTIONS[1:2]).lines()[0]
    wrong.answers[0] = wrong.answers[0][:3]
    assert "its answer ends there after 6 tokens, and here after 3" in compare(wrong, OPTIONS[1:2]).lines()[0]


@pytest.mark.parametrize("why", ["not installed", "cannot: OSError: no", "computes in bfloat16", "GB are free"])
def test_why_less_was_compared_is_said(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "transformers", None)
    elif why == "GB are free":
        monkeypatch.setattr(against_transformers, "free_bytes", lambda: 1e6)
    elif why == "cannot: OSError: no":
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Mock(side_effect=OSError("no")))
    report = compare(result_of(SHIPPED, "bfloat16" if "bfloat16" in why else "float32"), OPTIONS[1:2])
    assert why in report.lines()[0] and report.logits == 0 and not report.differences
    assert ("not compared" in report.lines()[0]) == (report.prompts == 0)
