# SPDX-License-Identifier: Apache-2.0
"""What becomes of hidden states on their way to experts, and how many bytes of them travel."""

from __future__ import annotations

import torch

import m2n
from m2n.testing import dequantize_rows, quantize_rows

FLOAT8 = "float8_e4m3fn"


def as_dispatched(x_TH: torch.Tensor, dispatch_dtype: str) -> torch.Tensor:
    """What experts get of the rows x [T, H] when these are dispatched as that type: other values, of the same dtype."""
    if dispatch_dtype == FLOAT8:
        values, scales = quantize_rows(x_TH)
        rows_TH: torch.Tensor = dequantize_rows(values, scales, str(x_TH.dtype).removeprefix("torch."))
        return rows_TH
    return x_TH.to(getattr(torch, dispatch_dtype)).to(x_TH.dtype)


def dispatch_bytes(shape: m2n.Shape) -> int:
    """Of a row on its way to an expert rank: its elements, and of float8 a scale for each 128."""
    if shape.dispatch_dtype != FLOAT8:
        return int(shape.hidden * getattr(torch, shape.dispatch_dtype).itemsize)
    return shape.hidden + 4 * -(-shape.hidden // 128)
