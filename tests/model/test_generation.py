# SPDX-License-Identifier: Apache-2.0
"""What generation_config.json asks of greedy tokens is done as transformers' generate() does it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_checkpoints as tiny  # noqa: E402

from m2n.reference_model.engine.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.errors import ConfigError  # noqa: E402
from m2n.reference_model.model.config import ModelConfig  # noqa: E402
from m2n.reference_model.model.sampling import Sampler, SamplingConfig  # noqa: E402

NUM_NEW = 24
MANY = list(range(0, 96, 2))


def tokens_of_both(directory: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Ours and those of transformers, each as the files say."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            given = {
                "input_ids": torch.tensor([prompt]),
                "attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
            }
            out = model.generate(**given, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    return MonolithicModel(directory).generate(prompts, NUM_NEW, microbatches=2), expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_moe", num_hidden_layers=1)


RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.05},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": MANY},
    {"begin_suppress_tokens": MANY},
    {"bad_words_ids": [[token] for token in MANY[:20]] + [[a, b] for a in range(40) for b in MANY[20:]]},
    {"eos_token_id": MANY, "min_new_tokens": 5},
    {"eos_token_id": MANY, "min_length": 12},
    {"eos_token_id": [3, 5], "suppress_tokens": [3], "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 3, "bos_token_id": 1},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules)[:40])
def test_greedy_tokens_follow_the_generation_config(rules: dict[str, Any], plain: Path) -> None:
    (plain / "generation_config.json").write_text(json.dumps(rules))
    ours, theirs = tokens_of_both(plain, tiny.prompts(3))
    assert ours == theirs


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}]
)
@pytest.mark.parametrize("config", [{}, {"eos_token_id": list(range(40))}, {"repetition_penalty": 2.0}])
def test_the_file_that_transformers_reads_says_what_ends_a_text(
    config: dict[str, Any], generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    """generation_config.json alone, where it exists; else config.json, which may hold such options of old."""
    tiny.make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1)
    tiny.edit_config(tmp_path, **{"eos_token_id": ..., **config})
    path = tmp_path / "generation_config.json"
    path.unlink(missing_ok=True) if generation is None else path.write_text(json.dumps(generation))
    ours, theirs = tokens_of_both(tmp_path, tiny.prompts(2))
    assert ours == theirs


@pytest.mark.parametrize(
    "rules",
    [
        {"num_beams": 4},
        {"forced_bos_token_id": 3},
        {"forced_eos_token_id": 3},
        {"exponential_decay_length_penalty": [5, 1.1]},
        {"sequence_bias": [[[3], 1.0]]},
        {"guidance_scale": 1.5},
        {"stop_strings": ["x"]},
        {"watermarking_config": {"bias": 2.0}},
        {"encoder_repetition_penalty": 1.2},
        {"penalty_alpha": 0.6},
        {"repetition_penalty": 0},
        {"repetition_penalty": "much"},
        {"no_repeat_ngram_size": -1},
        {"min_new_tokens": 1.5},
        {"suppress_tokens": [96]},
        {"suppress_tokens": list(range(-1, 5000))},
        {"begin_suppress_tokens": 4},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[]]},
        {"eos_token_id": [True]},
    ],
    ids=lambda rules: str(rules)[:40],
)
def test_what_is_not_done_is_refused_by_name(rules: dict[str, Any]) -> None:
    (name,) = rules
    with pytest.raises(ConfigError, match=name) as refused:
        ModelConfig.from_dict({"model_type": "mixtral", "vocab_size": 96}, rules)
    assert len(str(refused.value)) < 250 and "\n" not in str(refused.value)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e300])
def test_any_temperature_gives_tokens(temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature), 0)
    tokens = {sampler.next_token(torch.tensor([1.0, 80.0, -3e38, float("-inf")])) for _ in range(50)}
    assert tokens == {1} if temperature < 1 else tokens <= {0, 1, 2}
