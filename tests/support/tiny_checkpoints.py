# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints of each family, and the tokens that transformers generates from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
}


def model_class(family: str) -> tuple[Any, Any]:
    """The configuration and model classes of transformers for a family."""
    import transformers

    stem = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}[family]
    return getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForCausalLM")


def make_model(family: str, num_experts: int = 8, seed: int = 0, **options: Any) -> Any:
    """A random float32 model of transformers; options go into its configuration."""
    config_class, model_type = model_class(family)
    experts = {"num_local_experts" if family == "mixtral" else "num_experts": num_experts}
    if family == "qwen3_moe":
        experts["moe_intermediate_size"] = 40
    torch.manual_seed(seed)
    model = model_type(config_class(**{**BASE, **experts, **options})).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mistake
        for _name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Write the model as a Hugging Face checkpoint directory."""
    model.save_pretrained(directory, **options)
    return directory


def make_checkpoint(directory: Path, family: str, num_experts: int = 8, seed: int = 0, **options: Any) -> Path:
    """make_model and save in one."""
    return save(make_model(family, num_experts, seed, **options), directory)


def reference_tokens(model: Any, prompt_ids: list[int], num_new: int) -> list[int]:
    """Greedy tokens of transformers itself, end tokens ignored."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt_ids) :].tolist()


def prompts(count: int, seed: int = 0, longest: int = 24) -> list[list[int]]:
    """Random prompts of different lengths, one token long among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(2, longest, (count - 1,), generator=generator).tolist()]
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths[:count]]


def edit_config(directory: Path, **changes: Any) -> None:
    """Set (or with the value ... remove) options of a checkpoint's config.json."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            raw.pop(name, None)
        else:
            raw[name] = value
    path.write_text(json.dumps(raw))


def add_tokenizer(directory: Path) -> Path:
    """Write a tokenizer.json of one token per printable character (and one for all others)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(32 + idx): idx for idx in range(VOCAB - 1)} | {"¤": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="¤"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory
