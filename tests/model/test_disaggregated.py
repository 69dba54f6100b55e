# SPDX-License-Identifier: Apache-2.0
"""The disaggregated model: for any M, N and m its tokens are those of transformers and of the monolithic one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("hypothesis")

import tiny_checkpoints as tiny  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_runs import (  # noqa: E402
    EMULATED,
    FAMILIES,
    NUM_NEW,
    PROMPTS,
    checkpoint_and_tokens,
    make_run,
    run_as_threads,
    run_on_devices,
)

import m2n.testing  # noqa: E402
from m2n.reference_model.engine.monolithic import MonolithicModel  # noqa: E402
from m2n.reference_model.model.config import ModelConfig  # noqa: E402
from m2n.reference_model.run.launcher import Launcher  # noqa: E402
from m2n.reference_model.run.rank import load_decoder, load_experts, run_rank  # noqa: E402
from m2n.reference_model.run.verify import verify  # noqa: E402
from m2n.reference_model.run_config import ATTENTION, EXPERT  # noqa: E402

# (M, N): 2 and 1 divide the 8 experts of the even checkpoints, 3 does not; 7 experts are divided by nothing.
RANKS = [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"{ranks[0]}x{ranks[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_thread_ranks_generate_the_tokens_of_transformers(
    family: str, ranks: tuple[int, int], microbatches: int, root: Path
) -> None:
    directory, expected = checkpoint_and_tokens(root, family, 8 if microbatches != 2 else 7)
    result = run_as_threads(make_run(directory, *ranks, microbatches), PROMPTS)
    assert result.answers == expected


@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_both_places_of_the_sum_and_all_types_agree_with_the_monolithic_arithmetic(
    dtype: str, reduce_at: str, root: Path
) -> None:
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    run = make_run(directory, 2, 3, 2, dtype=dtype, reduce_at=reduce_at)
    report = verify(run_as_threads(run, PROMPTS))
    # In half precision the number of rows of a matrix product may move a result across a rounding edge.
    limit = 0.0 if dtype == "float32" else 0.2
    assert all(abs(about["logit_gap"]) <= limit for about in report["differences"]), report


def test_sampled_text_is_the_same_for_every_split(root: Path) -> None:
    directory, _ = checkpoint_and_tokens(root, "olmoe", 8)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    model = MonolithicModel(directory)
    for ranks in ((1, 2), (3, 1)):
        run = make_run(directory, *ranks, 2, **sampling)
        expected = model.generate(PROMPTS, NUM_NEW, run.sampling, ignore_eos=True)
        assert run_as_threads(run, PROMPTS).answers == expected


def test_an_attention_rank_without_prompts_delays_nobody(root: Path) -> None:
    directory, expected = checkpoint_and_tokens(root, "mixtral", 8)
    result = run_as_threads(make_run(directory, 3, 2, 2), PROMPTS[:2])
    assert result.answers == expected[:2]
    idle = next(about for about in result.ranks if about["role"] == "attention" and about["rank"] == 2)
    assert idle["steps"] == 0


@settings(max_examples=12, deadline=None)
@given(microbatches=st.integers(1, 6), max_tokens=st.integers(1, 40), max_batch=st.integers(1, 5))
def test_tokens_are_the_same_for_every_split_into_microbatches(
    root: Path, microbatches: int, max_tokens: int, max_batch: int
) -> None:
    """Prompts in pieces of any size, between decode steps of others, in microbatches that run empty."""
    directory, expected = checkpoint_and_tokens(root, "mixtral", 8)
    model = MonolithicModel(directory)
    options = {"microbatches": microbatches, "max_tokens": max_tokens, "max_batch": max_batch}
    assert model.generate(PROMPTS, NUM_NEW, ignore_eos=True, **options) == expected


@pytest.mark.parametrize("linger_us", [0.0, 20_000.0, None], ids=["no linger", "long linger", "lockstep"])
@pytest.mark.parametrize("num_prompts", [2, 4])
def test_lingering_and_lockstep_agree_token_for_token(linger_us: float | None, num_prompts: int, root: Path) -> None:
    """Unequal work: one rank has no prompt, or two where the others have one; and microbatches without tokens."""
    directory, expected = checkpoint_and_tokens(root, "qwen3_moe", 8)
    run = make_run(directory, 3, 2, 2, linger_us=linger_us)
    result = run_as_threads(run, PROMPTS[:num_prompts])
    assert result.answers == expected[:num_prompts]
    ranks = {(about["role"], about["rank"]): about for about in result.ranks}
    if linger_us is None and num_prompts == 4:
        # Every batch held all ranks that were still at work: no more of them than the longest rank's messages, of which
        # the last step of either microbatch may have been left undone.
        num_layers, steps = 2, max(ranks["attention", rank]["steps"] for rank in range(3))
        assert ranks["expert", 0]["batches"] <= num_layers * (steps + 2)


def test_a_slow_network_changes_no_token(root: Path) -> None:
    directory, expected = checkpoint_and_tokens(root, "mixtral", 8)
    run = make_run(directory, 2, 2, 3, delay_us=300.0, jitter_us=500.0, seed=7)
    result = run_as_threads(run, PROMPTS)
    assert result.answers == expected
    held = [about["held_us"] / about["signals_held"] for about in result.ranks]
    assert len(held) == 4 and all(mean_us >= 300 for mean_us in held)


def test_a_model_with_dense_layers_only_needs_no_dispatch(tmp_path: Path) -> None:
    model = tiny.make_model("qwen3_moe", mlp_only_layers=[0, 1])
    directory = tiny.save(model, tmp_path)
    expected = [tiny.reference_tokens(model, prompt, NUM_NEW) for prompt in PROMPTS[:2]]
    assert run_as_threads(make_run(directory, 1, 1, 1), PROMPTS[:2]).answers == expected


def test_recorded_routes_name_every_token_of_every_layer(root: Path, tmp_path: Path) -> None:
    directory, expected = checkpoint_and_tokens(root, "qwen3_moe", 8)
    run = make_run(directory, 2, 2, 2, record_routes=True)
    result, config = run_as_threads(run, PROMPTS), ModelConfig.from_directory(directory)
    assert result.answers == expected
    num_rows = result.write_routes(str(tmp_path / "routes.npz"), config)
    routes = np.load(tmp_path / "routes.npz")
    # The last token of an answer is never computed: nothing follows it.
    num_tokens = [len(prompt) + NUM_NEW - 1 for prompt in PROMPTS]
    keys = [
        (sequence, position, layer)
        for sequence, count in enumerate(num_tokens)
        for position in range(count)
        for layer in (0, 2)
    ]
    assert list(zip(routes["sequence"], routes["position"], routes["layer"])) == keys
    assert num_rows == len(keys) and routes["topk_ids"].shape == (num_rows, config.top_k)
    assert (routes["attention_rank"] == routes["sequence"] % 2).all()
    assert (routes["topk_ids"] >= 0).all() and (routes["topk_ids"] < 8).all()
    np.testing.assert_allclose(routes["topk_weights"].sum(1), 1, atol=1e-6)
    assert (int(routes["num_experts"]), int(routes["expert_ranks"])) == (8, 2)


def test_each_side_reads_only_its_own_tensors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2n.reference_model.model.checkpoint import Checkpoint

    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    read: list[str] = []
    original = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint, "tensor", lambda self, name, dtype: read.append(name) or original(self, name, dtype)
    )
    load_decoder(directory, torch.float32)
    assert read and not [name for name in read if ".experts." in name]
    read.clear()
    load_experts(directory, [2, 5], torch.float32)
    assert {name.split(".experts.")[1].split(".")[0] for name in read} == {"2", "5"}


# (1, 1) and (2, 3) run as processes in test_generate.py.
@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    [
        ("qwen3_moe", (1, 2), 2),
        pytest.param("olmoe", (2, 1), 3, marks=pytest.mark.slow),
        pytest.param("mixtral", (3, 2), 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else None,
)
def test_process_ranks_generate_the_tokens_of_transformers(
    family: str, ranks: tuple[int, int], microbatches: int, root: Path
) -> None:
    directory, expected = checkpoint_and_tokens(root, family, 8)
    launcher = Launcher(make_run(directory, *ranks, microbatches), PROMPTS)
    for _ in launcher.events():
        pass
    assert launcher.result.answers == expected
    assert len(launcher.result.ranks) == sum(ranks)
    assert all(child.process.returncode == 0 for child in launcher.children)


# ---- ranks on devices

DEVICES = [
    pytest.param(EMULATED, id="emulated"),
    pytest.param({"expert_device": "emulated"}, id="attention on cpu"),
    pytest.param({"attention_device": "emulated"}, id="experts on cpu"),
    pytest.param({"attention_device": "cuda", "expert_device": "cuda"}, id="cuda", marks=pytest.mark.cuda),
    pytest.param({"expert_device": "cuda"}, id="attention on cpu, experts on cuda", marks=pytest.mark.cuda),
    pytest.param({"attention_device": "cuda"}, id="attention on cuda, experts on cpu", marks=pytest.mark.cuda),
]
on_devices = pytest.mark.parametrize("devices", DEVICES)


@on_devices
@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
def test_ranks_on_devices_generate_the_tokens_of_the_monolithic_model(
    devices: dict[str, str], reduce_at: str, root: Path, tmp_path: Path
) -> None:
    """With a layer that has no experts, prompts in pieces, and one attention rank that ends before the other."""
    directory, expected = checkpoint_and_tokens(root, "qwen3_moe", 8)
    run = make_run(directory, 2, 3, 2, reduce_at=reduce_at, record_routes=True, **devices)
    result = run_on_devices(run, PROMPTS[:3], tmp_path)
    assert verify(result)["identical"] and result.answers == expected[:3]
    assert len(result.routes) == 2
    for about in result.ranks:
        assert about["device"] == run.device(about["role"]) and about["threads"] == 1 and about["bytes_sent"] > 0


@on_devices
def test_lockstep_and_sampling_on_devices_change_no_token(devices: dict[str, str], root: Path, tmp_path: Path) -> None:
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    run = make_run(
        directory, 3, 2, 2, linger_us=None, reduce_at="attention", temperature=0.8, top_p=0.9, seed=3, **devices
    )
    verdict = verify(run_on_devices(run, PROMPTS, tmp_path))
    assert verdict["identical"], verdict


@on_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_dispatch_gives_the_tokens_of_a_monolithic_model_that_rounds_likewise(
    devices: dict[str, str], dtype: str, root: Path, tmp_path: Path
) -> None:
    """Each expert computes its rows alone, so that bfloat16's products do not depend on who else came."""
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    run = make_run(directory, 1, 2, 1, reduce_at="attention", dtype=dtype, dispatch_dtype="float8_e4m3fn", **devices)
    assert verify(run_on_devices(run, PROMPTS[:1], tmp_path))["identical"]


def test_an_expert_rank_that_leaves_ends_the_run_before_a_wrong_token(root: Path, tmp_path: Path) -> None:
    directory, expected = checkpoint_and_tokens(root, "mixtral", 8)
    run, config = make_run(directory, 1, 1, 1, **EMULATED), ModelConfig.from_directory(directory)
    weights, drawn = load_experts(directory, list(range(8)), torch.float32), []

    def serve_some() -> None:
        with m2n.ExpertComm(
            0, run.shape(config), run.placement(config), str(tmp_path), "emulated", config=run.comm_config
        ) as comm:
            for _ in range(2 * 2 + 1):  # two layers of two pieces or steps, and one layer of the next
                batch = comm.dispatch_recv()
                comm.combine_send(batch, weights.outputs(batch.layer, batch.gather(), batch.expert_offsets.tolist()))

    thread = threading.Thread(target=serve_some, daemon=True)
    thread.start()
    with pytest.raises(m2n.PeerLost, match="expert rank 0"):
        run_rank(run, ATTENTION, 0, {0: PROMPTS[0][:3]}, str(tmp_path), drawn.append)
    thread.join()
    assert sum(event["event"] == "tokens" for event in drawn) == 2


def test_processes_on_unlike_devices_generate_the_tokens_of_transformers(root: Path) -> None:
    directory, expected = checkpoint_and_tokens(root, "qwen3_moe", 8)
    launcher = Launcher(make_run(directory, 1, 1, 2, attention_device="emulated"), PROMPTS[:2])
    for _ in launcher.events():
        pass
    assert launcher.result.answers == expected[:2]
    assert {about["role"]: about["device"] for about in launcher.result.ranks} == {ATTENTION: "emulated", EXPERT: "cpu"}
