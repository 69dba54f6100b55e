# SPDX-License-Identifier: Apache-2.0
"""Rows that are dispatched as float8: every bit of elements and scales, and what a batch shows of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import bodies
import ml_dtypes
import numpy as np
import pytest
import torch
from libraries import CXX
from oracle import OWN_MEMORY, as_numpy
from tiers import needs_compiler

import m2n
from m2n import arrays, testing
from m2n.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
on_devices = pytest.mark.parametrize("device", OWN_MEMORY)
TINY = float(np.finfo(np.float32).smallest_subnormal)
E4M3 = np.unique(np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))  # all that are >= 0


def float8_shape(hidden: int, tokens: int, combine_dtype: str = "bfloat16") -> m2n.Shape:
    return m2n.Shape(hidden, 2, 1, tokens, dispatch_dtype="float8_e4m3fn", combine_dtype=combine_dtype)


def exchange(x: Any, look: Any, device: str = "cpu", combine_dtype: str = "bfloat16", library: str = "torch") -> Any:
    """What `look` returns of the batch when x is dispatched to expert 0, whose rows then are those of x."""
    ids, weights = torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
    to = device if device.startswith("cuda") else "cpu"

    def attention(comm: m2n.AttentionComm) -> None:
        comm.dispatch_send(x if library == "numpy" else x.to(to), comm.route(ids.to(to), weights.to(to)))
        comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> Any:
        batch = comm.dispatch_recv(timeout=10)
        assert batch is not None
        seen = look(batch)
        comm.combine_send(batch, batch.gather())
        return seen

    shape = float8_shape(x.shape[1], len(x), combine_dtype)
    config = dataclasses.replace(bodies.NUMPY, arrays=library)
    return run_ranks((attention, expert), 1, 1, shape=shape, config=config, device=device)["expert", 0]


def bits_of_rows(batch: m2n.Batch) -> tuple[Any, Any]:
    """uint8 [T, hidden] and uint32 [T, blocks], as numpy."""
    index = batch.row_index_by_expert
    if isinstance(batch.x, np.ndarray):
        return batch.x.view(np.uint8)[index], batch.x_scales[index].view(np.uint32)
    values, scales = batch.x.view(torch.uint8)[index], batch.x_scales[index]
    return values.cpu().numpy(), scales.cpu().numpy().view(np.uint32)


def check_bits(x: torch.Tensor, device: str) -> None:
    values, scales = exchange(x, bits_of_rows, device)
    expected_values, expected_scales = testing.quantize_rows(x)
    assert np.array_equal(scales, expected_scales.numpy().view(np.uint32))
    assert np.array_equal(values, expected_values.view(torch.uint8).numpy())


def rows_of_every_kind(hidden: int) -> torch.Tensor:
    """Ordinary rows, and those at which arithmetic goes wrong."""
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(20, hidden, generator=generator) * torch.logspace(-44, 38, 20)[:, None]
    where = torch.rand(x.shape, generator=generator)
    x[0], x[1] = 0.0, -0.0
    x[2] = torch.where(where[2] < 0.5, TINY, -3 * TINY)  # amax / 448 is 0
    x[3] = torch.where(where[3] < 0.5, 671 * TINY, 5 * TINY)  # and here rounds to a scale that is too small
    x[4][where[4] < 0.2] = float("nan")
    x[5], x[6] = float("nan"), float("inf")
    x[7][where[7] < 0.2] = float("inf")
    x[8][where[8] < 0.2] = -float("inf")
    x[9] = torch.finfo(torch.float32).max
    x[10] = torch.tensor(0xFFFFFFFF, dtype=torch.uint32).view(torch.float32)  # a NaN with a sign
    return x


@on_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", [1, 40, 128, 130, 200, 256, 1100])
def test_elements_and_scales_equal_the_oracle_bit_for_bit(hidden: int, dtype: str, device: str) -> None:
    check_bits(rows_of_every_kind(hidden).to(getattr(torch, dtype)), device)


@on_devices
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits(dtype: str, device: str) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(getattr(torch, dtype)).reshape(64, 1024)
    check_bits(x, device)


@on_devices
def test_ties_go_to_even_and_their_neighbours_to_the_nearest(device: str) -> None:
    """A block has 448 in it, so that its scale is 1, and all midpoints of float8 with the numbers around them."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    numbers = np.concatenate(
        [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(1e9)), E4M3]
    )
    numbers = np.concatenate([numbers, -numbers])
    numbers = np.pad(numbers, (0, -len(numbers) % 127)).reshape(-1, 127)
    x = torch.from_numpy(np.concatenate([np.full((len(numbers), 1), 448, np.float32), numbers], 1))
    check_bits(x, device)
    values, scales = testing.quantize_rows(x)
    assert (scales == 1).all()
    nearest = np.abs(np.abs(x.numpy())[..., None] - E4M3).min(-1)  # no number of float8 is nearer
    assert np.array_equal(np.abs(x.numpy() - values.float().numpy()), nearest)
    sent = dict(zip(x.flatten().tolist(), (values.view(torch.uint8) & 1).flatten().tolist()))
    assert not any(sent[middle] for middle in middles.tolist())


@needs_compiler
def test_kernels_divide_by_a_scale_without_divisions(tmp_path: Path) -> None:
    """By random scales, of random numbers and of those next to where float8 rounds the other way."""
    program = tmp_path / "quotient"
    options = ["-std=c++20", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-DM2N_HAS_CUDA=0"]
    subprocess.run([CXX, *options, str(ROOT / "tests/exchange/quotient.cc"), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "1", "500000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


@on_devices
def test_rows_at_any_address(device: str) -> None:
    """x with strided rows that begin at no whole 16 bytes."""
    wide = rows_of_every_kind(300).bfloat16()
    check_bits(wide[:, 37:293], device)


@pytest.mark.sanitize
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_numpy_sees_the_same_bits(device: str) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        x = rows_of_every_kind(200).to(getattr(torch, dtype))
        values, scales = exchange(as_numpy(x), bits_of_rows, device, library="numpy")
        expected_values, expected_scales = testing.quantize_rows(as_numpy(x))
        assert np.array_equal(values, expected_values.view(np.uint8))
        assert np.array_equal(scales, expected_scales.view(np.uint32))


def test_the_oracle_says_the_same_in_torch_and_in_numpy() -> None:
    for hidden, tokens in ((1, 20), (200, 20), (256, 20), (200, 0)):
        x = rows_of_every_kind(hidden)[:tokens]
        values, scales = testing.quantize_rows(x)
        in_numpy = testing.quantize_rows(x.numpy())
        assert np.array_equal(values.view(torch.uint8).numpy(), in_numpy[0].view(np.uint8))
        assert np.array_equal(scales.numpy(), in_numpy[1])
        for dtype in ("float32", "bfloat16", "float16"):
            back = as_numpy(testing.dequantize_rows(values, scales, dtype)).astype(np.float32)
            again = testing.dequantize_rows(*in_numpy, dtype).astype(np.float32)
            assert np.array_equal(back, again, equal_nan=True)


@on_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gather_applies_the_scales(dtype: str, device: str) -> None:
    x = rows_of_every_kind(200)

    def look(batch: m2n.Batch) -> Any:
        rows, padded, out = batch.gather(), batch.gather("padded"), torch.zeros(len(x), 200)
        assert rows.dtype == padded.dtype == getattr(torch, dtype) and padded.shape == (2, len(x), 200)
        assert torch.equal(padded[0].view(torch.uint8), rows.view(torch.uint8)) and not padded[1].any()
        assert batch.gather(out=out) is out and torch.equal(out.nan_to_num(), rows.float().cpu().nan_to_num())
        return rows.cpu()

    expected = testing.dequantize_rows(*testing.quantize_rows(x), dtype)
    assert torch.equal(exchange(x, look, device, dtype).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("has_ml_dtypes", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gather_in_numpy_also_without_ml_dtypes(
    dtype: str, has_ml_dtypes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows_of_every_kind(200)
    expected = as_numpy(testing.dequantize_rows(*testing.quantize_rows(x), dtype))
    if not has_ml_dtypes:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    dtypes, rows = exchange(x.numpy(), lambda batch: (batch.x.dtype, batch.gather()), "cpu", dtype, "numpy")
    assert dtypes == (ml_dtypes.float8_e4m3fn if has_ml_dtypes else np.uint8)
    assert rows.dtype == arrays.numpy_dtype(dtype)
    assert np.array_equal(rows.view(expected.dtype).astype("f4"), expected.astype("f4"), equal_nan=True)


def test_elements_and_scales_lie_in_the_window() -> None:
    x = torch.randn(4, 200)
    seen = []

    def look(batch: m2n.Batch) -> Any:
        seen.append(batch)
        assert batch.x.dtype == torch.float8_e4m3fn and batch.x.shape[1] == 200 and batch.x.stride() == (208, 1)
        assert batch.x_scales.shape == (len(batch.x), 2) and batch.x_scales.stride() == (52, 1)
        assert batch.x_scales.data_ptr() == batch.x.data_ptr() + 200
        return batch.x.data_ptr() == batch.x.data_ptr()

    assert exchange(x, look)
    with pytest.raises(m2n.Error, match="combine_send has given the rows back"):
        _ = seen[0].x_scales


def test_bytes_are_those_that_travel() -> None:
    shape = dataclasses.replace(float8_shape(200, 8), top_k=2)
    workload = testing.make_workload(shape)

    def attention(comm: m2n.AttentionComm) -> dict[str, float]:
        comm.dispatch_send(workload.x, comm.route(workload.topk_ids, workload.topk_weights))
        comm.combine_recv()
        return comm.stats()

    def expert(comm: m2n.ExpertComm) -> dict[str, float]:
        bodies.answer(comm, 1)
        return comm.stats()

    results = run_ranks((attention, expert), 1, 1, shape=shape)
    expected = 64 + 8 * (200 + 2 * 4 + 2 * 4 * 2)
    assert results["attention", 0]["bytes_sent"] == results["expert", 0]["bytes_received"] == expected


def test_rows_of_another_type_have_no_scales() -> None:
    shape = m2n.Shape(16, 2, 1, 4)

    def attention(comm: m2n.AttentionComm) -> None:
        comm.dispatch_send(torch.ones(1, 16).bfloat16(), comm.route(torch.zeros(1, 1).int(), torch.ones(1, 1)))
        comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        batch = comm.dispatch_recv(timeout=10)
        assert batch is not None and batch.x_scales is None
        comm.combine_send(batch, batch.gather())

    run_ranks((attention, expert), 1, 1, shape=shape, config=dataclasses.replace(bodies.NUMPY, arrays="torch"))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    "x, words",
    [
        (torch.ones(2, 64).double(), "x: expected float32, bfloat16 or float16, got float64"),
        (torch.ones(2, 64).int(), "x: expected float32, bfloat16 or float16, got int32"),
        (torch.ones(2, 64).to(torch.float8_e4m3fn), "^x: "),
        (np.ones((2, 64), ml_dtypes.float8_e4m3fn), "^x: "),
    ],
    ids=["float64", "int32", "float8", "numpy"],
)
def test_what_becomes_float8_must_be_one_of_three_types(x: Any, words: str, device: str) -> None:
    def attention(comm: m2n.AttentionComm) -> None:
        with pytest.raises(TypeError, match=words):
            comm.dispatch_send(x, comm.route(torch.zeros(2, 1).int(), torch.ones(2, 1)))
        with pytest.raises(ValueError, match=r"x: expected shape \[T, 64\], got float32 \[2, 63\]"):
            comm.dispatch_send(torch.ones(2, 63), comm.route(torch.zeros(2, 1).int(), torch.ones(2, 1)))
        assert comm.stats()["messages_sent"] == 0

    def expert(comm: m2n.ExpertComm) -> int:
        return bodies.answer(comm, 1)

    results = run_ranks((attention, expert), 1, 1, shape=float8_shape(64, 4), device=device)
    assert results["expert", 0] == 0
