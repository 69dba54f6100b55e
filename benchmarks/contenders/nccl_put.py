# SPDX-License-Identifier: Apache-2.0
"""NCCL's one-sided puts from the host (ncclPutSignal, ncclWaitSignal; NCCL 2.29 or newer) by ctypes: torch has no call
for them.

Every rank registers a window of the same size; a put copies from the own window into that of a peer and then raises the
peer's signal, which the peer's stream waits for. Between ranks of one host that reach each other's memory NCCL uses
cudaMemcpy and stream memory operations for it, no kernel.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SINCE = 22900  # ncclPutSignal
SHARED_SINCE = 23000  # several ranks on one GPU
UINT8, COLL_SYMMETRIC = 1, 1  # ncclUint8, NCCL_WIN_COLL_SYMMETRIC


class UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = [("internal", ctypes.c_ubyte * 128)]


class WaitSignalDesc(ctypes.Structure):
    """ncclWaitSignalDesc_t."""

    _fields_ = [(name, ctypes.c_int) for name in ("opCnt", "peer", "sigIdx", "ctx")]


# The arguments as nccl.h declares them, alike in 2.29.2, 2.29.7, 2.30.7 and 2.32.3.
# tests/benchmarks/test_nccl_put.py holds them against the header where one is installed.
RETURNS_RESULT: dict[str, tuple[str, ...]] = {
    "ncclGetVersion": ("int*",),
    "ncclGetUniqueId": ("ncclUniqueId*",),
    "ncclCommInitRank": ("ncclComm_t*", "int", "ncclUniqueId", "int"),
    "ncclCommDestroy": ("ncclComm_t",),
    "ncclMemAlloc": ("void**", "size_t"),
    "ncclMemFree": ("void*",),
    "ncclCommWindowRegister": ("ncclComm_t", "void*", "size_t", "ncclWindow_t*", "int"),
    "ncclCommWindowDeregister": ("ncclComm_t", "ncclWindow_t"),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclPutSignal": (
        *("const void*", "size_t", "ncclDataType_t", "int", "ncclWindow_t", "size_t", "int", "int", "unsigned int"),
        *("ncclComm_t", "cudaStream_t"),
    ),
    "ncclWaitSignal": ("int", "ncclWaitSignalDesc_t*", "ncclComm_t", "cudaStream_t"),
}
RETURNS_TEXT: dict[str, tuple[str, ...]] = {
    "ncclGetErrorString": ("ncclResult_t",),
    "ncclGetLastError": ("ncclComm_t",),
}
# Pointers and handles are void*.
VALUES: dict[str, Any] = {
    "int": ctypes.c_int, "unsigned int": ctypes.c_uint, "size_t": ctypes.c_size_t,
    "ncclResult_t": ctypes.c_int, "ncclDataType_t": ctypes.c_int, "ncclUniqueId": UniqueId,
}  # fmt: skip


class NcclError(RuntimeError):
    """A call failed, or NCCL is not here, or too old."""


def find_library() -> str:
    """That of the wheel beside torch, else the system's."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, "lib/libnccl.so.2")).exists():
            return str(path)
    return "libnccl.so.2"


class Library:
    """libnccl.so.2, of at least 2.29."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise NcclError(f"unable to load NCCL: {error}") from None
        self.path, self.version = path, self._version()
        if self.version < SINCE:
            raise NcclError(f"NCCL {self.version_words} ({path}): ncclPutSignal is not supported before 2.29")
        for names, result in ((RETURNS_RESULT, ctypes.c_int), (RETURNS_TEXT, ctypes.c_char_p)):
            for name, arguments in names.items():
                function = getattr(self._library, name)
                function.argtypes = [VALUES.get(argument, ctypes.c_void_p) for argument in arguments]
                function.restype = result

    def _version(self) -> int:
        version = ctypes.c_int()
        self._library.ncclGetVersion(ctypes.byref(version))
        return version.value

    @property
    def version_words(self) -> str:
        """As 2.29.2."""
        return f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"

    def call(self, name: str, *arguments: Any) -> None:
        """NcclError with NCCL's own words where it fails."""
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            texts = self._library.ncclGetErrorString(result), self._library.ncclGetLastError(None)
            words = "; ".join(text.decode(errors="replace").strip() for text in texts if text)
            raise NcclError(f"{name}: {words} (NCCL {self.version_words})")


class Memory:
    """What torch needs to see memory that NCCL has allocated on a GPU."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def tensor_at(address: int, num_bytes: int, device: str) -> torch.Tensor:
    """uint8, the memory itself."""
    if device == "cpu":
        return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(Memory(address, num_bytes), device=device)


class Window:
    """A rank of a communicator, and its window of `num_bytes`, as many as everybody's: `memory`, uint8."""

    def __init__(
        self, library: Library, store: dist.Store, rank: int, num_ranks: int, num_bytes: int, device: str
    ) -> None:
        self._library, self._device = library, device
        unique_id = UniqueId()
        if rank == 0:
            library.call("ncclGetUniqueId", ctypes.byref(unique_id))
            store.set("nccl-id", bytes(unique_id.internal).hex())
        else:
            unique_id = UniqueId.from_buffer_copy(bytes.fromhex(store.get("nccl-id").decode()))
        self._comm, self._window, address = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        library.call("ncclCommInitRank", ctypes.byref(self._comm), num_ranks, unique_id, rank)
        library.call("ncclMemAlloc", ctypes.byref(address), num_bytes)
        where = ctypes.byref(self._window)
        library.call("ncclCommWindowRegister", self._comm, address, num_bytes, where, COLL_SYMMETRIC)
        # Success without a window is how NCCL says it.
        if not self._window or address.value is None:
            raise NcclError("symmetric windows are not supported between these ranks; NCCL_DEBUG=INFO says why")
        self._address: int = address.value
        self.memory = tensor_at(self._address, num_bytes, device)

    def put(self, pieces: Sequence[tuple[int, int, int, int]]) -> None:
        """One group of puts: for each the peer, the bytes, from where in this window and to where in the peer's."""
        self._library.call("ncclGroupStart")
        for peer, num_bytes, own_offset, peer_offset in pieces:
            self._library.call(
                "ncclPutSignal", self._address + own_offset, num_bytes, UINT8, peer, self._window, peer_offset,
                0, 0, 0, self._comm, self._stream(),
            )  # fmt: skip
        self._library.call("ncclGroupEnd")

    def wait(self, peers: Sequence[int]) -> None:
        """The stream goes on when each of them has put once more."""
        signals = (WaitSignalDesc * len(peers))(*(WaitSignalDesc(1, peer, 0, 0) for peer in peers))
        self._library.call("ncclWaitSignal", len(peers), signals, self._comm, self._stream())

    def close(self) -> None:
        """When all puts have been waited for, on both sides."""
        self._library.call("ncclCommWindowDeregister", self._comm, self._window)
        self._library.call("ncclMemFree", self._address)
        self._library.call("ncclCommDestroy", self._comm)

    def _stream(self) -> int | None:
        return None if self._device == "cpu" else torch.cuda.current_stream().cuda_stream
