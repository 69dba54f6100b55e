# SPDX-License-Identifier: Apache-2.0
"""The tensor edge: torch, numpy and cupy in and out, by DLPack; each is used only where the caller uses it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _C

# numpy 1 exports no array that is read-only, as it could not say so.
_HIDES_READ_ONLY = np.lib.NumpyVersion(np.__version__) < "2.0.0"


class _Readable:
    """The memory of a numpy array that is only read, without the mark that says so."""

    def __init__(self, array: Any) -> None:
        self._array = array  # kept alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


@functools.cache
def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


_torch_tensor: Any = None  # torch.Tensor, once somebody has imported torch: to look at a type takes a tenth of the rest


def is_torch(tensor: Any) -> bool:
    """Is it a torch tensor? Looks without importing torch."""
    global _torch_tensor
    if type(tensor) is _torch_tensor:
        return True
    _torch_tensor = getattr(sys.modules.get("torch"), "Tensor", None)  # None, too, while torch is being imported
    return _torch_tensor is not None and isinstance(tensor, _torch_tensor)


def is_on_cpu(tensor: Any) -> bool:
    """Where a tensor says that it lies; True for what is none, which somebody else refuses."""
    try:
        return bool(tensor.__dlpack_device__()[0] == 1)
    except Exception:
        return True


def exportable(tensor: Any, is_written: bool = False) -> Any:
    """What DLPack can carry: numpy's bfloat16 (ml_dtypes) goes as its bits, and torch's gradient stays behind."""
    if type(tensor) is _torch_tensor:
        return tensor.detach() if tensor.requires_grad else tensor
    if _HIDES_READ_ONLY and not is_written and isinstance(tensor, np.ndarray) and not tensor.flags.writeable:
        tensor = np.asarray(_Readable(tensor)).view(tensor.dtype)
    if isinstance(tensor, np.ndarray) and tensor.dtype.type.__name__ == "bfloat16":  # dtype.name takes 2 us
        return tensor.view(np.uint16)
    if is_torch(tensor) and tensor.requires_grad:
        return tensor.detach()
    return tensor


def numpy_dtype(name: str) -> Any:
    """The dtype of that name in numpy. bfloat16 and float8_e4m3fn are ml_dtypes' where installed, else raw bits."""
    bits = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}.get(name)
    if bits is None:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(bits)
    return np.dtype(getattr(ml_dtypes, name))


def library_of(tensor: Any) -> str:
    """ "torch", "cupy" or "numpy": what a tensor belongs to."""
    if is_torch(tensor):
        return "torch"
    return "cupy" if type(tensor).__module__.partition(".")[0] == "cupy" else "numpy"


def empty(rows: int, hidden: int, dtype: str, like: Any) -> Any:
    """A new [rows, hidden] tensor of the library, and on the device, of `like`."""
    library = library_of(like)
    if library == "torch":
        import torch

        kind = _torch_dtype(dtype)
        if like.dtype is kind and like.shape == (rows, hidden):
            return torch.empty_like(like)  # in half the time
        return torch.empty((rows, hidden), dtype=kind, device=like.device)
    if library == "cupy":
        import cupy

        return cupy.empty((rows, hidden), dtype="uint16" if dtype == "bfloat16" else dtype)
    return np.empty((rows, hidden), dtype=numpy_dtype(dtype))


def zeros(shape: Sequence[int], like: Any) -> Any:
    """A new tensor of zeros of the library, dtype and device of `like`."""
    library = library_of(like)
    if library == "torch":
        return like.new_zeros(shape)
    if library == "cupy":
        import cupy

        return cupy.zeros(shape, like.dtype)
    return np.zeros(shape, like.dtype)


def view(array: _C.Array, library: str) -> Any:
    """A tensor of "torch", "cupy" or "numpy" over native memory, which it keeps alive.

    cupy has bfloat16 as uint16 and float8 as uint8: their bits.
    """
    if library == "torch":
        import torch

        if array.is_float8:  # DLPack knows it since 1.1, torch's since later
            return torch.from_dlpack(array.bits()).view(torch.float8_e4m3fn)
        return torch.from_dlpack(array)
    if library == "cupy":
        import cupy

        return cupy.from_dlpack(array.bits() if array.is_bfloat16 or array.is_float8 else array)
    if array.is_bfloat16 or array.is_float8:
        return np.from_dlpack(array.bits()).view(numpy_dtype("bfloat16" if array.is_bfloat16 else "float8_e4m3fn"))
    return np.from_dlpack(array)


def take_float8(values: Any, scales: Any, index: Any, dtype: str) -> Any:
    """Rows `index` of float8 rows as `dtype`: float(q) * scale, one product in float32, rounded once.

    Args:
        values: [W, hidden] of float8, or its bits. scales: float32 [W, ceil(hidden / 128)]. index: ints [P].

    Returns:
        [P, hidden], new. cupy, and numpy without ml_dtypes, have bfloat16 as its bits.
    """
    hidden = values.shape[1]
    if is_torch(values):
        import torch

        rows = values.view(torch.uint8)[index].view(torch.float8_e4m3fn).float()  # not every torch indexes float8
        rows *= scales[index].repeat_interleave(128, 1)[:, :hidden]
        return rows.to(getattr(torch, dtype))
    library: Any = sys.modules[library_of(values)]  # numpy or cupy
    with np.errstate(all="ignore"):  # NaN, infinity: what became of x
        rows = library.asarray(_float8_numbers())[values.view("uint8")[index]]
        rows *= library.repeat(scales[index], 128, axis=1)[:, :hidden]
        if dtype != "bfloat16":
            return rows.astype(dtype)
    bits = rows.view("uint32")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = library.where(library.isnan(rows), 0x7FC0, rounded).astype("uint16")
    return rounded.view(numpy_dtype(dtype)) if library is np else rounded


@functools.cache
def _float8_numbers() -> Any:
    """float32 [256]: the numbers that the bits of float8_e4m3fn stand for."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    numbers = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    numbers[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits < 128, numbers, -numbers).astype(np.float32)


def choose(library: str, device: str) -> str:
    """Resolves "auto": torch when this process has imported it; else cupy on a GPU, numpy on the CPU."""
    if library == "numpy" and device.startswith("cuda"):
        raise ValueError(f"config.arrays: 'numpy' cannot hold the memory of {device!r}; use 'torch' or 'cupy'")
    if library != "auto":
        return library
    if "torch" in sys.modules:
        return "torch"
    return "cupy" if device.startswith("cuda") else "numpy"


def device_name(device: Any) -> str:
    """ "cpu", "emulated" or "cuda:0", from a name or a torch.device.

    Raises:
        ValueError: another device.
    """
    name = str(device)
    if name == "cuda":
        return "cuda:0"
    is_cuda = name.startswith("cuda:") and name[5:].isdecimal()
    if name not in ("cpu", "emulated") and not is_cuda:
        raise ValueError(f"device: expected 'cpu', 'cuda', 'cuda:<number>' or 'emulated', got {name!r}")
    return name


def is_capturing(device: str) -> bool:
    """Is torch's or cupy's current stream being recorded into a CUDA graph?"""
    if not device.startswith("cuda"):
        return False
    if "torch" in sys.modules:
        import torch

        return torch.cuda.is_available() and bool(torch.cuda.is_current_stream_capturing())
    if "cupy" in sys.modules:
        import cupy

        return bool(cupy.cuda.get_current_stream().is_capturing())
    return False


def stream_handle(stream: Any, device: str) -> int:
    """The CUDA stream a verb goes to, as an integer: torch's or cupy's object, a raw handle, or the current one.

    Raises:
        ValueError: a stream for a device that has none. TypeError: not a stream.
    """
    if not device.startswith("cuda"):
        if stream is not None:
            raise ValueError(f"stream: {device!r} has none, got {stream!r}")
        return 0
    if stream is None:
        if "torch" in sys.modules:
            import torch

            return int(torch.cuda.current_stream(torch.device(device)).cuda_stream)
        if "cupy" in sys.modules:
            import cupy

            return int(cupy.cuda.get_current_stream().ptr)
        return 0
    for attribute in ("cuda_stream", "ptr"):  # torch, cupy
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if isinstance(stream, bool) or not hasattr(stream, "__index__"):
        raise TypeError(f"stream: expected a torch or cupy stream or a handle, got {type(stream).__name__}")
    return int(stream.__index__())
