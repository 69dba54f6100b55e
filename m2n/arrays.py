# SPDX-License-Identifier: Apache-2.0
"""The tensor edge: torch and numpy in and out, by DLPack. torch is used only where the caller uses it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _C


def is_torch(tensor: Any) -> bool:
    """Is it a torch tensor? Looks without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def exportable(tensor: Any) -> Any:
    """What DLPack can carry: numpy's bfloat16 (ml_dtypes) goes as its bits, and torch's gradient stays behind."""
    if isinstance(tensor, np.ndarray) and tensor.dtype.name == "bfloat16":
        return tensor.view(np.uint16)
    if is_torch(tensor) and tensor.requires_grad:
        return tensor.detach()
    return tensor


def numpy_bfloat16() -> Any:
    """The dtype that stands for bfloat16 in numpy: ml_dtypes' where installed, else uint16, the raw bits."""
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(np.uint16)
    return np.dtype(ml_dtypes.bfloat16)


def empty(rows: int, hidden: int, dtype: str, library: str) -> Any:
    """A new [rows, hidden] tensor of "torch" or "numpy"."""
    if library == "torch":
        import torch

        return torch.empty((rows, hidden), dtype=getattr(torch, dtype))
    return np.empty((rows, hidden), dtype=numpy_bfloat16() if dtype == "bfloat16" else dtype)


def view(array: _C.Array, library: str) -> Any:
    """A tensor of "torch" or "numpy" over native memory, which it keeps alive."""
    if library == "torch":
        import torch

        return torch.from_dlpack(array)
    if array.is_bfloat16:
        return np.from_dlpack(array.bits()).view(numpy_bfloat16())
    return np.from_dlpack(array)


def choose(library: str) -> str:
    """Resolves "auto": torch when this process has imported it."""
    if library != "auto":
        return library
    return "torch" if "torch" in sys.modules else "numpy"
