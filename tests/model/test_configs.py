# SPDX-License-Identifier: Apache-2.0
"""Configurations of real models (tests/model/configs): each loads, shrunk, and gives the logits of transformers, or is
refused in one line that names what is missing. And single options, by their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_checkpoints as tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from m2n.reference_model.engine.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.errors import CheckpointError, ConfigError, brief  # noqa: E402
from m2n.reference_model.model.config import ModelConfig  # noqa: E402

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
LOADS = {
    *("mixtral-8x7b-v0.1", "mixtral-8x22b-v0.1", "olmoe-1b-7b-0924", "qwen3-30b-a3b", "qwen3-235b-a22b"),
    "qwen3-coder-480b-a35b-instruct",
}
# What the refusal of each other one names.
MISSING = {
    "dbrx": "DbrxForCausalLM", "deepseek-v3.2": "DeepseekV32ForCausalLM", "deepseek-v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekV3ForCausalLM", "kimi": "DeepseekV3ForCausalLM", "glm": "Glm4MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM", "granite": "GraniteMoeForCausalLM", "llama-4": "Llama4ForConditionalGeneration",
    "minimax": "minimax_m2", "phi": "PhiMoEForCausalLM", "qwen1.5": "Qwen2MoeForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM", "qwen3-next": "Qwen3NextForCausalLM", "qwen3-vl": "Qwen3VLMoeForConditional",
    "qwen3.5": "Qwen3_5MoeForConditional", "qwen3-30b-a3b-fp8": "quantization_config: weights quantised by 'fp8'",
}  # fmt: skip


def shrink(raw: dict[str, Any]) -> dict[str, Any]:
    """The same structure with small numbers: ratios of heads, norms, ropes and switches stay."""
    num_kv_heads = min(2, raw["num_key_value_heads"])
    num_heads = num_kv_heads * (raw["num_attention_heads"] // raw["num_key_value_heads"])
    small = {
        **raw,
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_heads,
        "hidden_size": 24 if raw.get("head_dim") else 8 * num_heads,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "vocab_size": tiny.VOCAB,
        "num_experts_per_tok": min(raw["num_experts_per_tok"], 4),
        "initializer_range": 0.3,
        "torch_dtype": "float32",
    }
    small |= {name: 8 for name in ("num_experts", "num_local_experts", "head_dim") if raw.get(name)}
    small |= {"moe_intermediate_size": 12} if "moe_intermediate_size" in raw else {}
    small |= {
        name: raw[name] % tiny.VOCAB for name in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(name)
    }
    return small


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_config_loads_and_equals_transformers_or_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    raw = json.loads(CONFIGS[name].read_text())
    if name not in LOADS:
        with pytest.raises(ConfigError) as refused:
            ModelConfig.from_dict(raw)
        missing = next(words for stem, words in sorted(MISSING.items(), reverse=True) if name.startswith(stem))
        assert missing in str(refused.value) and len(str(refused.value)) < 250 and "\n" not in str(refused.value)
        return
    assert ModelConfig.from_dict(raw).num_layers == raw["num_hidden_layers"]
    small = shrink(raw)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**small)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    tiny.save(reference, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small))  # the keys as its maker wrote them
    prompt = tiny.prompts(2)[1]
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(MonolithicModel(tmp_path).logits(prompt), theirs, rtol=1e-4, atol=1e-4)


MIXTRAL = {"model_type": "mixtral", "vocab_size": 96}
QWEN = {"model_type": "qwen3_moe", "vocab_size": 96}


@pytest.mark.parametrize(
    ("raw", "name", "neutral", "other"),
    [
        (QWEN, "use_qk_norm", True, "no"),
        (MIXTRAL, "use_qk_norm", False, True),
        (MIXTRAL, "pretraining_tp", 1, 2),
        (QWEN, "shared_expert_intermediate_size", 0, 64),
        (MIXTRAL, "routed_scaling_factor", 1.0, 2.5),
        (MIXTRAL, "scoring_func", "softmax", "sigmoid"),
        (MIXTRAL, "mlp_bias", False, True),
        (MIXTRAL, "layer_scales", [], [1.0]),
        (MIXTRAL, "logits_soft_cap", None, 30.0),
        (MIXTRAL, "num_beams", 1, 4),
        (MIXTRAL, "forced_eos_token_id", None, 3),
    ],
)
def test_an_option_counts_by_its_value(raw: dict[str, Any], name: str, neutral: Any, other: Any) -> None:
    assert ModelConfig.from_dict({**raw, name: neutral}) == ModelConfig.from_dict(raw)
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_dict({**raw, name: other})


@pytest.mark.parametrize(
    "name", ["router_aux_loss_coef", "hidden_dropout", "router_z_loss_coef", "_name_or_path", "ep_size"]
)
def test_an_option_of_training_or_bookkeeping_is_none_of_ours(name: str) -> None:
    assert ModelConfig.from_dict({**MIXTRAL, name: 0.25}) == ModelConfig.from_dict(MIXTRAL)


def test_a_message_shows_a_long_value_cut() -> None:
    with pytest.raises(ConfigError, match="layer_scales") as refused:
        ModelConfig.from_dict({**MIXTRAL, "layer_scales": list(range(10_000))})
    assert len(str(refused.value)) < 250
    assert brief("x" * 1000).endswith("...") and len(brief(ValueError("x\n" * 1000))) <= 120


def test_the_context_is_what_the_rope_is_made_for(tmp_path: Path) -> None:
    """YaRN stretches 48 positions by 4; max_position_embeddings was left as it was."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
    reference = tiny.make_model("mixtral", head_dim=8, max_position_embeddings=64, rope_scaling=yarn)
    model = MonolithicModel(tiny.save(reference, tmp_path))
    assert model.config.context == 192
    prompt = [token % tiny.VOCAB for token in range(120)]
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(model.logits(prompt), theirs, rtol=1e-4, atol=1e-4)
    linear = {**MIXTRAL, "max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelConfig.from_dict(linear).context == 128
    with pytest.raises(ConfigError, match="option factor of rope_type 'yarn' must be a positive number, not 'four'"):
        ModelConfig.from_dict({**MIXTRAL, "rope_scaling": {"type": "yarn", "factor": "four"}})


def logits_of_both(directory: Path) -> tuple[Any, Any]:
    prompt = tiny.prompts(2)[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return MonolithicModel(directory).logits(prompt), theirs(torch.tensor([prompt])).logits[0, -1]


def test_of_several_saves_in_a_directory_the_one_counts_that_transformers_reads(tmp_path: Path) -> None:
    tiny.save(tiny.make_model("mixtral", seed=1), tmp_path, max_shard_size="20KB")  # the older save
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    shards = {path: path.read_bytes() for path in tmp_path.glob("model*")}
    tiny.save(tiny.make_model("mixtral", seed=2), tmp_path)
    for path, content in shards.items():
        path.write_bytes(content)
    torch.testing.assert_close(*logits_of_both(tmp_path), rtol=1e-4, atol=1e-4)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    torch.testing.assert_close(*logits_of_both(tmp_path), rtol=1e-4, atol=1e-4)


def test_a_tensor_that_two_shards_hold_is_that_of_the_later_file(tmp_path: Path) -> None:
    """Whatever the index says: as transformers has it."""
    tiny.save(tiny.make_model("mixtral"), tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    tensors = load_file(tmp_path / last)
    tensors[name] = 2 * load_file(tmp_path / first)[name]
    save_file(tensors, tmp_path / last, metadata={"format": "pt"})
    ours, theirs = logits_of_both(tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    index["weight_map"][name] = "model-00009-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names model-00009-of-00002.safetensors, which is missing"):
        MonolithicModel(tmp_path)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_tied_checkpoint_with_a_head_of_its_own_uses_it(is_copy: bool, tmp_path: Path) -> None:
    tiny.make_checkpoint(tmp_path, "mixtral", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if is_copy else torch.randn_like(embedding)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(*logits_of_both(tmp_path), rtol=1e-4, atol=1e-4)
    decoder = MonolithicModel(tmp_path).decoder
    assert (decoder.head is decoder.embedding) == is_copy, "a copy takes no memory of its own"
