# SPDX-License-Identifier: Apache-2.0
"""Rounds of steps on devices (`--cuda-graphs`): their order, decode steps of one form, products of all experts at once,
and whole runs. Without a GPU all launches of a round run, but are not recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_runs import EMULATED, FAMILIES, PROMPTS, checkpoint_and_tokens, make_run, run_on_devices  # noqa: E402

from m2n.reference_model import trace  # noqa: E402
from m2n.reference_model.engine.decode import CachePool, DecodeBatch  # noqa: E402
from m2n.reference_model.engine.layers import pass_through  # noqa: E402
from m2n.reference_model.engine.schedule import ATTEND, COMBINE, DISPATCH, round_schedule, served_in_round  # noqa: E402
from m2n.reference_model.errors import InputError  # noqa: E402
from m2n.reference_model.model import experts  # noqa: E402
from m2n.reference_model.model.sequence import KVCache, Sequence  # noqa: E402
from m2n.reference_model.run.rank import load_decoder, load_experts  # noqa: E402
from m2n.reference_model.run.verify import verify  # noqa: E402
from m2n.reference_model.run_config import RunConfig  # noqa: E402

ON_CUDA = {"attention_device": "cuda", "expert_device": "cuda"}
on_devices = pytest.mark.parametrize(
    "devices",
    [pytest.param(EMULATED, id="emulated"), pytest.param(ON_CUDA, id="cuda", marks=pytest.mark.cuda)],
)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


# ---- the order


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 4))
def test_a_round_takes_every_microbatch_through_every_layer(moe_layers: list[bool], num_microbatches: int) -> None:
    done = [0] * num_microbatches  # layers
    away: dict[int, int] = {}
    asked = []
    for kind, _, layer, microbatch, _ in round_schedule(moe_layers, num_microbatches):
        if kind == ATTEND:
            assert microbatch not in away and done[microbatch] == layer
            done[microbatch] += not moe_layers[layer]
        elif kind == DISPATCH:
            away[microbatch] = layer
            asked.append((layer, microbatch))
        else:
            assert kind == COMBINE and away.pop(microbatch) == layer
            done[microbatch] += 1
            # In between the others were computed: their messages are with the experts, or answered.
            assert all(other in away or done[other] > layer for other in range(num_microbatches))
    assert not away and done == [len(moe_layers)] * num_microbatches
    assert asked == served_in_round(moe_layers, num_microbatches)


# ---- decode steps of one form


def next_tokens(caches: list[KVCache], starts: list[int], token: int) -> list[Sequence]:
    """A token of each sequence, behind what its cache holds."""
    return [
        Sequence(i, [0] * start + [token + i], cache=cache, num_computed=start, num_scheduled=1)
        for i, (cache, start) in enumerate(zip(caches, starts))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_of_one_form_gives_the_logits_of_any_other(family: str, root: Path) -> None:
    directory, _ = checkpoint_and_tokens(root, family, 8)
    decoder = load_decoder(directory, torch.float32)
    pool, starts = CachePool(decoder, 4, 24), [3, 12, 20]
    pool.take()  # so that numbers of caches are not those of places
    own = [KVCache.allocate(decoder.config, 24, torch.float32) for _ in starts]
    pooled = [pool.take() for _ in starts]
    for caches in (own, pooled):
        for i, (cache, start) in enumerate(zip(caches, starts)):
            prompt = Sequence(i, list(range(5 + i, 5 + i + start)), num_scheduled=start, cache=cache)
            pass_through(decoder, decoder.begin([prompt]))
    batch = DecodeBatch.allocate(decoder, pool, num_places=5)
    addresses = batch.inputs_3B.data_ptr(), batch.num_used.data_ptr()
    for step in range(3):
        at = [start + step for start in starts]
        expected = pass_through(decoder, decoder.begin(next_tokens(own, at, 30 + step)))
        batch.fill(next_tokens(pooled, at, 30 + step))
        batch.begin(decoder)
        got = pass_through(decoder, batch)
        assert int(batch.num_used) == 3 and torch.isfinite(got).all()
        torch.testing.assert_close(got[:3], expected, rtol=1e-4, atol=1e-4)
    assert (batch.inputs_3B.data_ptr(), batch.num_used.data_ptr()) == addresses


def test_a_cache_that_was_given_back_is_taken_again(root: Path) -> None:
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    pool = CachePool(load_decoder(directory, torch.float32), 2, 8)
    first, second = pool.take(), pool.take()
    numbers = {pool.number(first), pool.number(second)}
    assert len(numbers) == 2 and pool.unused not in numbers
    number = pool.number(first)
    pool.give_back(first)
    again = pool.take()
    assert pool.number(again) == number and again.keys_LGSD.data_ptr() == first.keys_LGSD.data_ptr()


# ---- products of all experts at once


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 1), (4, 4, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_all_experts_are_those_of_each(dtype: Any, counts: tuple[int, ...], root: Path) -> None:
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    weights = load_experts(directory, [1, 4, 6], dtype)
    assert weights.can_group == (dtype == torch.bfloat16 and experts.grouped_mm is not None)
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    # As many pairs as there is room for: what lies behind the last may be anything.
    x_PH = torch.full((2 * 12, weights.config.hidden), float("nan"), dtype=dtype)
    x_PH[: offsets[-1]] = torch.randn(offsets[-1], weights.config.hidden)
    expected = weights.outputs(0, x_PH, offsets)
    got = weights.outputs_at(0, x_PH, torch.tensor(offsets, dtype=torch.int32))
    assert got.shape == x_PH.shape and torch.isfinite(expected).all()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got[: offsets[-1]], expected, rtol=tolerance, atol=tolerance)


def test_rows_laid_out_by_expert_and_back_are_the_same_rows() -> None:
    offsets, num_pairs = torch.tensor([0, 2, 2, 5], dtype=torch.int32), 8
    at, place = experts.places(offsets, num_pairs, max_rows=4)
    assert at.shape == (3, 4) and at.flatten()[place[:5]].tolist() == list(range(5))


# ---- whole runs


@on_devices
@pytest.mark.parametrize("reduce_at", ["expert", "attention"])
@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    [("mixtral", (1, 1), 1), ("qwen3_moe", (2, 2), 2), ("olmoe", (3, 2), 3)],
    ids=lambda value: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else None,
)
def test_rounds_generate_the_tokens_of_transformers(
    family: str,
    ranks: tuple[int, int],
    microbatches: int,
    reduce_at: str,
    devices: dict[str, str],
    root: Path,
    tmp_path: Path,
) -> None:
    """Prompts in pieces, sequences that enter while others are at work, ranks with less work and one without any."""
    directory, expected = checkpoint_and_tokens(root, family, 8)
    for num_prompts in (len(PROMPTS), 2):
        options: dict[str, Any] = {"cuda_graphs": True, "reduce_at": reduce_at, **devices}
        run = make_run(directory, *ranks, microbatches, **options)
        result = run_on_devices(run, PROMPTS[:num_prompts], tmp_path / f"store {num_prompts}")
        assert result.answers == expected[:num_prompts]
        at_work = {about["rank"]: about for about in result.ranks if about["role"] == "attention"}
        assert [at_work[rank]["steps"] > 0 for rank in range(ranks[0])] == [
            rank < num_prompts for rank in range(ranks[0])
        ]
        kinds = {kind for each in result.traces for kind in each.field("kind").tolist()}
        assert trace.ROUND in kinds and trace.ATTENTION in kinds  # rounds of both kinds


@on_devices
@pytest.mark.parametrize("dispatch_dtype", [None, "float8_e4m3fn"])
def test_rounds_in_bfloat16_agree_with_the_monolithic_model(
    dispatch_dtype: str | None, devices: dict[str, str], root: Path, tmp_path: Path
) -> None:
    directory, _ = checkpoint_and_tokens(root, "mixtral", 8)
    options = {"dtype": "bfloat16", "dispatch_dtype": dispatch_dtype, "cuda_graphs": True, **devices}
    report = verify(run_on_devices(make_run(directory, 2, 2, 2, **options), PROMPTS, tmp_path))
    # The number of rows of a matrix product may move a result across a rounding edge.
    assert all(abs(about["logit_gap"]) <= 0.2 for about in report["differences"]), report


@pytest.mark.parametrize(
    "options",
    [{}, {"expert_device": "emulated"}, {"attention_device": "emulated"}, {**EMULATED, "record_routes": True}],
    ids=str,
)
def test_graphs_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cuda-graphs needs attention and experts on devices and no record-routes"):
        RunConfig(checkpoint="", cuda_graphs=True, **options)


# ---- what a GPU did when


class FakeEvent:
    """A CUDA event on a clock of the test."""

    clock_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = FakeEvent.clock_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_a_device_tracer_takes_its_times_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    trace._device_clock.cache_clear()
    tracer = trace.DeviceTracer("cuda:0", max_events=3)
    origin_ns = trace._device_clock("cuda:0")[1]
    trace._device_clock.cache_clear()
    began = tracer.now()
    FakeEvent.clock_ms = 0.25
    began = tracer.add(trace.ATTENTION, began, 3, 1, 0)
    FakeEvent.clock_ms = 1.0
    last = tracer.add(trace.COMBINE_RECV, began, 3, 1, 0, 64)
    assert tracer.num_dropped == 0
    assert tracer.add(trace.ROUTE, last, 3, 1, 0) is None and tracer.num_dropped == 1  # no event is left
    assert tracer.seconds(trace.COMPUTING) == pytest.approx(250e-6)
    assert tracer.seconds((trace.WAIT,)) == pytest.approx(750e-6)
    events = trace.Trace.decode("attention", 0, tracer.encode()).events.tolist()
    at = [origin_ns, origin_ns + 250_000, origin_ns + 1_000_000]
    assert events == [
        [trace.ATTENTION, at[0], at[1], 3, 1, 0, 0, 0],
        [trace.WAIT, at[1], at[2], 3, 1, 0, 0, 0],
        [trace.COMBINE_RECV, at[2], at[2], 3, 1, 0, 64, 0],
    ]
