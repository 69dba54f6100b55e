# SPDX-License-Identifier: Apache-2.0
"""The oracle: seeded workloads and dispatch/combine in plain torch. Tests, benchmarks and models compare with it.

`m2n.testing.run_ranks` starts ranks for examples, notebooks and tests (it is defined in `m2n.ranks`, without torch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _C, arrays
from .ranks import run_ranks, serve
from .shape import FLOAT8, Placement, Shape

__all__ = [
    "KINDS",
    "Workload",
    "apply_expert",
    "dequantize_rows",
    "expert_outputs",
    "make_workload",
    "oracle_combine",
    "quantize_rows",
    "run_ranks",
    "serve",
    "start_seq_at",
]

_BLOCK = 128  # elements of a float8 row that share a scale
KINDS = ("uniform", "skewed", "one_expert", "zero_tokens", "one_token", "padded")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one attention rank dispatches: x [T, hidden], topk_ids int64 [T, top_k], topk_weights float32 [T, top_k].

    x is of shape.dispatch_dtype; bfloat16 where that is float8.
    """

    x: Any
    topk_ids: Any
    topk_weights: Any


def start_seq_at(seq: int) -> None:
    """Comms made from here on in this process take `seq` as the number of the last message: the next one is seq + 1.

    For tests of what happens where message numbers wrap, at 2**32: a link reaches it after billions of messages, or
    at once after start_seq_at(2**32 - 3). Both sides of a link need the same; start_seq_at(0) is the default again.
    """
    _C.start_seq_at(seq)


def make_workload(shape: Shape, kind: str = "uniform", seed: int = 0, num_tokens: int | None = None) -> Workload:
    """A seeded workload of one of KINDS.

    Args:
        kind: "uniform"; "skewed" (expert popularity falls as 1/rank); "one_expert" (everybody's first choice is the
            same); "zero_tokens"; "one_token"; "padded" (a third of the ids are -1, some tokens have none).
        num_tokens: T; default shape.max_tokens.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    tokens = {"zero_tokens": 0, "one_token": 1}.get(kind, shape.max_tokens if num_tokens is None else num_tokens)
    popularity = torch.ones(shape.num_experts)
    if kind == "skewed":
        popularity = 1.0 / torch.arange(1, shape.num_experts + 1)
    noise = torch.rand(tokens, shape.num_experts, generator=generator).clamp_min(1e-9)
    scores = noise.log() / popularity  # the largest are a weighted sample without replacement
    if kind == "one_expert" and tokens:
        scores[:, shape.num_experts // 2] = 1.0
    ids = scores.topk(shape.top_k, dim=-1).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator) + 0.01
    weights = weights / weights.sum(-1, keepdim=True)
    if kind == "padded":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.34, -1)
    dtype = "bfloat16" if shape.dispatch_dtype == FLOAT8 else shape.dispatch_dtype
    x = torch.randn(tokens, shape.hidden, generator=generator).to(getattr(torch, dtype))
    return Workload(x, ids, weights)


def quantize_rows(x: Any) -> tuple[Any, Any]:
    """What becomes of rows that are dispatched as float8, bit for bit. Blocks of 128; the last of a row may be shorter.

    scale = amax / 448 in float32, 1 where that is not above 0; amax leaves NaN out. Values are x / scale in float32, to
    the nearest (even), at most +-448; NaN is 0x7F.

    Args:
        x: [T, hidden] of float32, bfloat16 or float16, in torch or numpy (which needs ml_dtypes).

    Returns:
        values [T, hidden] of float8_e4m3fn and scales float32 [T, ceil(hidden / 128)], of the same library.
    """
    hidden = x.shape[1]
    if arrays.is_torch(x):
        import torch

        blocks = torch.nn.functional.pad(x.float(), (0, -hidden % _BLOCK)).unflatten(1, (-1, _BLOCK))
        amax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(-1)
        scales = amax / torch.full_like(amax, 448.0)  # by a number, a GPU would take the reciprocal times
        scales = torch.where(scales > 0, scales, 1.0)
        quotients = blocks / scales[..., None]
        values = quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        values = values.masked_fill(quotients.isnan(), 0x7F).flatten(1)[:, :hidden]
        return values.contiguous().view(torch.float8_e4m3fn), scales
    import ml_dtypes

    blocks = np.pad(x.astype(np.float32), ((0, 0), (0, -hidden % _BLOCK))).reshape(len(x), -(-hidden // _BLOCK), _BLOCK)
    with np.errstate(all="ignore"):
        amax = np.where(np.isnan(blocks), np.float32(0), np.abs(blocks)).max(-1)
        scales = amax / np.float32(448)
        scales = np.where(scales > 0, scales, np.float32(1))
        quotients = blocks / scales[..., None]
        values = np.clip(quotients, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    values[np.isnan(quotients)] = 0x7F
    return values.reshape(len(x), scales.shape[1] * _BLOCK)[:, :hidden].copy().view(ml_dtypes.float8_e4m3fn), scales


def dequantize_rows(values: Any, scales: Any, dtype: str) -> Any:
    """float(q) * scale, one product in float32, rounded once to `dtype`: what `Batch.gather` makes of float8 rows.

    Args:
        values, scales: as from `quantize_rows`. dtype: "float32", "bfloat16" or "float16".

    Returns:
        [T, hidden], of the same library.
    """
    hidden = values.shape[1]
    if arrays.is_torch(values):
        import torch

        factors = scales[..., None].expand(*scales.shape, _BLOCK).flatten(1)[:, :hidden]
        return (values.float() * factors).to(getattr(torch, dtype))
    with np.errstate(all="ignore"):
        factors = np.repeat(scales, _BLOCK, axis=1)[:, :hidden]
        return (values.astype(np.float32) * factors).astype(arrays.numpy_dtype(dtype))


def apply_expert(expert: int, x_RH: Any) -> Any:
    """A stand-in for an expert: element by element, so that its bits do not depend on how rows are batched.

    Takes and returns torch or numpy rows [R, hidden]; computed in float32, the result has x's dtype.
    """
    scale, bias = 0.5 + 0.25 * (expert % 5), 0.125 * expert
    if arrays.is_torch(x_RH):
        return (x_RH.float() * scale + bias).to(x_RH.dtype)
    return (x_RH.astype("float32") * np.float32(scale) + np.float32(bias)).astype(x_RH.dtype)


def expert_outputs(batch: Any, experts: Sequence[int], apply: Callable[[int, Any], Any] = apply_expert) -> Any:
    """y [P, hidden] of a batch, expert-major, for the local `experts` (global ids, ascending).

    Of float8 batches the experts get what `Batch.gather` gives: rows of shape.combine_dtype.
    """
    offsets = batch.expert_offsets.tolist()
    y_PH = batch.gather()
    for expert, begin, end in zip(experts, offsets, offsets[1:]):
        if end > begin:
            y_PH[begin:end] = apply(expert, y_PH[begin:end])
    return y_PH


def oracle_combine(
    workload: Workload,
    shape: Shape,
    placement: Placement,
    attention_rank: int = 0,
    apply: Callable[[int, Any], Any] = apply_expert,
) -> Any:
    """What combine_recv must return, bit for bit: [T, hidden] of shape.combine_dtype.

    With float8 rows, experts get x after `quantize_rows` and `dequantize_rows` to combine_dtype.
    The arithmetic is fixed. reduce_at="expert": per home rank, from +0, in ascending expert id,
    partial = partial + weight * float32(y), cast once to combine_dtype; the total adds the partials in float32 from
    +0 in ascending home rank. reduce_at="attention": y is cast to combine_dtype, and the total adds weight * y in
    top-k order. Every product and sum rounds separately.
    """
    import torch

    combine_dtype = getattr(torch, shape.combine_dtype)
    x = workload.x
    if shape.dispatch_dtype == FLOAT8:
        x = dequantize_rows(*quantize_rows(x), shape.combine_dtype)
    results = []
    for token, (x_H, ids, weights) in enumerate(zip(x, workload.topk_ids.tolist(), workload.topk_weights)):
        pairs = [(expert, weights[k]) for k, expert in enumerate(ids) if expert >= 0]
        outputs = {expert: apply(expert, x_H[None])[0] for expert, _ in pairs}
        total_H = torch.zeros(shape.hidden)
        if shape.reduce_at == "attention":
            for expert, weight in pairs:
                total_H = total_H + weight * outputs[expert].to(combine_dtype).float()
        else:
            partials: dict[int, Any] = {}
            for expert, weight in sorted(pairs, key=lambda pair: pair[0]):
                home = placement.home(expert, token, attention_rank)
                partial_H = partials.get(home, torch.zeros(shape.hidden))
                partials[home] = partial_H + weight * outputs[expert].float()
            for home in sorted(partials):
                total_H = total_H + partials[home].to(combine_dtype).float()
        results.append(total_H.to(combine_dtype))
    return torch.stack(results) if results else torch.empty(0, shape.hidden, dtype=combine_dtype)
