# SPDX-License-Identifier: Apache-2.0
"""Random tiny checkpoints against transformers: token ids, first logits, greedy tokens.

    python tests/support/differential.py --first-seed 0 --seeds 200 --json F

Tokenizers that were saved with truncation and padding, that fall back to bytes, whose tokens only a config names; tied
heads and heads of their own; ropes; shards beside older saves; generation configs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import tiny_checkpoints as tiny
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from m2n.reference_model.engine.monolithic import MonolithicModel
from m2n.reference_model.errors import InputError
from m2n.reference_model.model.tokenizer import Tokenizer
from m2n.reference_model.run.against_transformers import compare
from m2n.reference_model.run.result import RunResult
from m2n.reference_model.run_config import RunConfig

VOCAB = 320
WORDS = ["hello", "world", " ", "  two", "é", "😀", "<sep>", "<end>", "a" * 30, "\n", "\u3042", "lo and"]
NUM_NEW = 10


def make_options(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A family, and options of its config."""
    family = draw.choice(["mixtral", "qwen3_moe", "olmoe"])
    kv_heads, ratio, head_dim = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.choice([8, 16])
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * ratio,
        "hidden_size": kv_heads * ratio * head_dim,
        "head_dim": head_dim,
        "num_hidden_layers": draw.choice([1, 2]),
        "num_experts": draw.choice([4, 7]),
        "num_experts_per_tok": draw.choice([1, 2, 3]),
        "tie_word_embeddings": draw.random() < 0.4,
        "hidden_act": draw.choice(["silu", "silu", "gelu"]),
        "rope_theta": draw.choice([1e4, 100.0]),
        "max_position_embeddings": 256,
        "eos_token_id": draw.choice([None, 5, list(range(0, VOCAB, 9))]),
    }
    if family != "olmoe" and draw.random() < 0.4:
        options["hidden_size"] = 40  # not heads times their width
    if family == "mixtral":
        options["sliding_window"] = draw.choice([None, 6])
    else:
        options |= {"norm_topk_prob": draw.random() < 0.5, "attention_bias": draw.random() < 0.5}
    original = {"original_max_position_embeddings": 64}
    rope = draw.choice(
        [
            {},
            {},
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, **original},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5, **original},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
            {"rope_type": "dynamic", "factor": 2.0},
        ]
    )
    return family, options | ({"rope_scaling": rope} if rope else {})


def make_tokenizer(draw: random.Random, directory: Path) -> None:
    tokenizer = tiny_tokenizers.KINDS[draw.choice(list(tiny_tokenizers.KINDS))]()
    if draw.random() < 0.5:
        tokenizer.enable_truncation(max_length=6)
    if draw.random() < 0.5:
        tokenizer.enable_padding(length=20, pad_id=0)
    numbered = {"310": tiny_tokenizers.as_dict("<end>", True), "309": tiny_tokenizers.as_dict("<sep>", False)}
    config = draw.choice(
        [{}, {"added_tokens_decoder": numbered}, {"eos_token": "<end>", "extra_special_tokens": ["<sep>"]}]
    )
    tiny_tokenizers.save(tokenizer, directory, **config)


def lay_out(draw: random.Random, model: Any, directory: Path) -> None:
    """The model's files, with what other saves have left beside them."""
    layout = draw.choice(["single", "shards", "single beside older shards", "shards that overlap"])
    if layout == "single beside older shards":
        older = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(directory, state_dict=older, max_shard_size="30KB")
        kept = {path: path.read_bytes() for path in directory.glob("model*")}
    model.save_pretrained(directory, max_shard_size="30KB" if layout.startswith("shards") else "1GB")
    if layout == "single beside older shards" and (directory / "model.safetensors").exists():
        for path, content in kept.items():
            path.write_bytes(content) if path.name != "model.safetensors" else None
    shards = sorted(directory.glob("model-*.safetensors"))
    if layout == "shards that overlap" and len(shards) > 1:
        first, last = load_file(shards[0]), load_file(shards[-1])
        name = draw.choice(sorted(first))
        save_file({**last, name: first[name] * 0.5}, shards[-1], metadata={"format": "pt"})
    single = directory / "model.safetensors"
    if model.config.tie_word_embeddings and single.exists() and draw.random() < 0.5:
        tensors = load_file(single)
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = draw.choice([embedding.clone(), embedding.flip(0).contiguous()])
        save_file(tensors, single, metadata={"format": "pt"})


def make_generation(draw: random.Random, directory: Path) -> None:
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True)
    rules = draw.choice(
        [
            None,
            {},
            {"eos_token_id": [3, 7, 11]},
            {"repetition_penalty": 1.3},
            {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(0, VOCAB, 3))},
            {"eos_token_id": list(range(0, VOCAB, 2)), "min_new_tokens": 4, "begin_suppress_tokens": list(range(100))},
            {"do_sample": True, "temperature": 0.7, "top_k": 20},
            draw.choice([{"repetition_penalty": 2.0}, {"forced_eos_token_id": 3}]),
        ]
    )
    if rules is not None:
        path.write_text(json.dumps(rules))


def make_checkpoint(seed: int, directory: Path) -> list[str]:
    """A random checkpoint; texts to try it with."""
    draw = random.Random(seed)
    family, options = make_options(draw)
    lay_out(draw, tiny.make_model(family, seed=seed, **options), directory)
    tiny.edit_config(directory, transformers_version=..., router_aux_loss_coef=draw.choice([0.0, 0.01]))
    make_tokenizer(draw, directory)
    make_generation(draw, directory)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(2)]


def outcome(seed: int) -> str:
    """ "equal", "refused: ..." or "differs: ..."."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        texts = make_checkpoint(seed, directory)
        try:
            tokenizer, model = Tokenizer(directory), MonolithicModel(directory)
        except InputError as error:
            return f"refused: {error}"
        run = RunConfig(str(directory), max_new_tokens=NUM_NEW)
        texts = [text for text in texts if tokenizer.encode(text)]
        result = RunResult(run, [tokenizer.encode(text) for text in texts])
        result.answers = model.generate(result.prompts, NUM_NEW)
        report = compare(result, texts)
        if report.differences or report.why_not or report.logits != len(texts):
            return f"differs: {'; '.join([*report.differences, report.why_not])}"
        return "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = {seed: outcome(seed) for seed in range(args.first_seed, args.first_seed + args.seeds)}
    counts = Counter(text.partition(":")[0] for text in outcomes.values())
    odd = {seed: text for seed, text in outcomes.items() if text != "equal"}
    report = {
        "command": "python tests/support/differential.py " + " ".join(sys.argv[1:]),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "counts": counts,
        "not_equal": odd,
    }
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if counts["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
