# SPDX-License-Identifier: Apache-2.0
"""The monolithic reference model against transformers, and what its configuration and loader refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_checkpoints as tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from m2n.reference_model.engine.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.errors import CheckpointError, ConfigError, InputError  # noqa: E402
from m2n.reference_model.model.config import ModelConfig  # noqa: E402
from m2n.reference_model.model.sampling import Sampler, SamplingConfig  # noqa: E402

NUM_NEW = 12
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")

# Every option of the three families that changes the result, by a name for the test.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-sliding-window": ("mixtral", {"sliding_window": 7}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral-head-dim": ("mixtral", {"head_dim": 16}),
    "mixtral-gelu": ("mixtral", {"hidden_act": "gelu"}),
    "mixtral-top-3-of-5": ("mixtral", {"num_experts": 5, "num_experts_per_tok": 3}),
    "mixtral-rope-linear": ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mixtral-rope-theta": ("mixtral", {"rope_theta": 100.0}),
    "mixtral-rms-eps": ("mixtral", {"rms_norm_eps": 0.1}),
    "qwen3": ("qwen3_moe", {}),
    "qwen3-norm-topk": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-head-dim": ("qwen3_moe", {"head_dim": 16}),
    "qwen3-dense-layers": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "qwen3-sparse-step": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen3-bias": ("qwen3_moe", {"attention_bias": True}),
    "qwen3-sliding-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "qwen3-rope-yarn": (
        "qwen3_moe",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "olmoe": ("olmoe", {}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.5}),
    "olmoe-bias-norm-topk": ("olmoe", {"attention_bias": True, "norm_topk_prob": True}),
    "olmoe-relu": ("olmoe", {"hidden_act": "relu"}),
    "olmoe-rope-llama3": (
        "olmoe",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_logits_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    reference = tiny.make_model(family, **options)
    model = MonolithicModel(tiny.save(reference, tmp_path))
    prompts = tiny.prompts(3)
    expected = [tiny.reference_tokens(reference, prompt, NUM_NEW) for prompt in prompts]
    assert model.generate(prompts, NUM_NEW, ignore_eos=True) == expected
    for prompt in prompts:
        with torch.no_grad():
            theirs = reference(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(model.logits(prompt), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_neither_on_prefill_pieces_nor_on_batching(family: str, tmp_path: Path) -> None:
    model = MonolithicModel(tiny.make_checkpoint(tmp_path, family, num_hidden_layers=2))
    prompts = tiny.prompts(5, longest=40)
    expected = [model.generate([prompt], NUM_NEW, ignore_eos=True)[0] for prompt in prompts]
    for max_batch, max_tokens, microbatches in ((1, 5, 1), (5, 6, 2), (3, 16, 3)):
        options: dict[str, Any] = {
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "microbatches": microbatches,
        }
        assert model.generate(prompts, NUM_NEW, ignore_eos=True, **options) == expected, options


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_near_those_of_transformers(family: str, dtype: Any, tmp_path: Path) -> None:
    reference = tiny.make_model(family, initializer_range=0.1)
    model = MonolithicModel(tiny.save(reference, tmp_path), dtype)
    reference = reference.to(dtype)
    prompt = tiny.prompts(2)[1]
    with torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0, -1].float()
    torch.testing.assert_close(model.logits(prompt), theirs, rtol=0.1, atol=0.1)


def test_grouped_arithmetic_changes_nothing_in_float32_tokens(tmp_path: Path) -> None:
    model = MonolithicModel(tiny.make_checkpoint(tmp_path, "mixtral"))
    prompts = tiny.prompts(3)
    expected = model.generate(prompts, NUM_NEW, ignore_eos=True)
    groups = [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert model.generate(prompts, NUM_NEW, groups=groups, ignore_eos=True) == expected
    assert model.generate(prompts, NUM_NEW, reduce_at="attention", ignore_eos=True) == expected


def test_generation_stops_at_an_end_token_and_at_the_end_of_the_context(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path, "mixtral", max_position_embeddings=32)
    prompts = [tiny.prompts(2)[1]]
    free = MonolithicModel(directory).generate(prompts, 100)[0]
    assert len(prompts[0]) + len(free) == 32
    tiny.edit_config(directory, eos_token_id=[free[3], 95])
    (directory / "generation_config.json").unlink()
    end = free.index(free[3])
    assert MonolithicModel(directory).generate(prompts, 100)[0] == free[: end + 1]
    assert MonolithicModel(directory).generate(prompts, 100, ignore_eos=True)[0] == free
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": free[0]}))
    assert MonolithicModel(directory).generate(prompts, 100)[0] == free[:1]


# ---- files


def test_sharded_and_fused_checkpoints_give_the_same_tokens(tmp_path: Path) -> None:
    reference = tiny.make_model("qwen3_moe")
    single = tiny.save(reference, tmp_path / "single")
    sharded = tiny.save(reference, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = MonolithicModel(single).generate(tiny.prompts(2), NUM_NEW)
    assert MonolithicModel(sharded).generate(tiny.prompts(2), NUM_NEW) == expected
    tensors = load_file(single / "model.safetensors")
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        parts = [
            {p: tensors.pop(f"{base}.{e}.{p}.weight") for p in ("gate_proj", "up_proj", "down_proj")} for e in range(8)
        ]
        tensors[f"{base}.gate_up_proj"] = torch.stack([torch.cat((p["gate_proj"], p["up_proj"])) for p in parts])
        tensors[f"{base}.down_proj"] = torch.stack([p["down_proj"] for p in parts])
    save_file(tensors, single / "model.safetensors")
    assert MonolithicModel(single).generate(tiny.prompts(2), NUM_NEW) == expected


def broken(directory: Path, how: str) -> str:
    """Damage a checkpoint; return what the error must say."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        name = "model.layers.9.self_attn.q_proj.weight"
        tensors[name] = torch.zeros(3)
    elif how == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif how == "type":
        tensors[name] = tensors[name].to(torch.int8)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return "truncated: tensor"
    if how == "header":
        path.write_bytes(path.read_bytes()[:20])
        return "truncated"
    save_file(tensors, path)
    return name


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "type", "truncated", "header"])
def test_a_damaged_checkpoint_is_refused_by_file_and_tensor(how: str, tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path, "mixtral")
    expected = broken(directory, how)
    with pytest.raises(CheckpointError) as error:
        MonolithicModel(directory)
    assert expected in str(error.value) and str(tmp_path) in str(error.value)


def test_shards_that_lack_what_their_index_promises_are_refused(tmp_path: Path) -> None:
    directory = tiny.save(tiny.make_model("olmoe"), tmp_path, max_shard_size="40KB")
    index = directory / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    file = next(iter(whole["weight_map"].values()))
    index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], "model.ghost": file}}))
    with pytest.raises(CheckpointError, match="lacks tensor model.ghost"):
        MonolithicModel(directory)
    index.write_text(json.dumps(whole))
    (directory / file).unlink()
    with pytest.raises(CheckpointError, match="is missing from"):
        MonolithicModel(directory)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MonolithicModel(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        MonolithicModel(tmp_path)


# ---- configuration

MIXTRAL: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
QWEN: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
OLMOE: dict[str, Any] = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "unknown architecture 'LlamaForCausalLM'",
    ),
    (
        MIXTRAL,
        {"architectures": ["MixtralForTokenClassification"]},
        "unknown architecture 'MixtralForTokenCl",
    ),
    (MIXTRAL, {"attention_bias": True}, "attention_bias"),
    (MIXTRAL, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (MIXTRAL, {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
    (MIXTRAL, {"rope_scaling": {"type": "dynamic"}}, "needs the option factor"),
    (MIXTRAL, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    (MIXTRAL, {"rope_scaling": {"rope_type": "linear"}}, "needs the option factor"),
    (MIXTRAL, {"rope_parameters": {"rope_type": "default", "wavelength": 3}}, "option wavelength"),
    (MIXTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    (MIXTRAL, {"num_key_value_heads": 5}, "num_key_value_heads 5"),
    (MIXTRAL, {"hidden_size": 0}, "hidden_size"),
    (MIXTRAL, {"hidden_size": "big"}, "hidden_size"),
    (MIXTRAL, {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    (MIXTRAL, {"num_experts": 4, "num_local_experts": 8}, "num_local_experts"),
    (QWEN, {"use_sliding_window": True, "max_window_layers": 28}, "max_window_layers"),
    (QWEN, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    (QWEN, {"mlp_only_layers": "all"}, "mlp_only_layers"),
    (OLMOE, {"sliding_window": 64}, "sliding_window"),
    (OLMOE, {"head_dim": 64}, "head_dim"),
    (OLMOE, {"eos_token_id": "x"}, "eos_token_id"),
]


@pytest.mark.parametrize(("base", "changes", "expected"), REFUSED, ids=lambda value: None)
def test_an_option_that_is_not_supported_is_refused_by_name(
    base: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        ModelConfig.from_dict({**base, **changes})


def test_configurations_of_well_known_checkpoints_are_understood() -> None:
    qwen = ModelConfig.from_dict({**QWEN, "max_window_layers": 48, "sliding_window": None, "rope_scaling": None})
    assert (qwen.num_experts, qwen.top_k, qwen.expert_hidden, qwen.sliding_window) == (128, 8, 768, None)
    olmoe = ModelConfig.from_dict({**OLMOE, "clip_qkv": None, "rope_theta": 10000.0, "eos_token_id": 50279})
    assert (olmoe.num_experts, olmoe.num_kv_heads, olmoe.eos_token_ids) == (64, 16, {50279})
    mixtral = ModelConfig.from_dict({**MIXTRAL, "router_jitter_noise": 0.1, "sliding_window": 4096})
    assert (mixtral.num_experts, mixtral.rope.theta, mixtral.sliding_window) == (8, 1e6, 4096)


# ---- sampling


def test_sampling_follows_the_distribution_and_top_p_cuts_its_tail() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(SamplingConfig(temperature=1.0), 0)
    counts = torch.bincount(torch.tensor([sampler.next_token(logits) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)
    nucleus = Sampler(SamplingConfig(temperature=1.0, top_p=0.6), 0)
    assert {nucleus.next_token(logits) for _ in range(300)} == {0, 1}
    narrow = Sampler(SamplingConfig(temperature=1.0, top_p=1e-6), 0)
    assert {narrow.next_token(logits) for _ in range(50)} == {0}


def test_sampled_answers_depend_on_the_seed_and_not_on_batching(tmp_path: Path) -> None:
    model = MonolithicModel(tiny.make_checkpoint(tmp_path, "mixtral"))
    prompts = tiny.prompts(5)
    sampling = SamplingConfig(temperature=1.0, top_p=0.9, seed=7)
    together = model.generate(prompts, NUM_NEW, sampling, max_batch=5)
    assert model.generate(prompts, NUM_NEW, sampling, max_batch=2, microbatches=2, max_tokens=9) == together
    assert model.generate(prompts, NUM_NEW, SamplingConfig(temperature=1.0, top_p=0.9, seed=8)) != together


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_sampling_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingConfig(**options)
