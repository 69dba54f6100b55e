# SPDX-License-Identifier: Apache-2.0
"""How verbs run: in the thread that calls them, or launched on a device. A comm takes one of both when it is made; the
roles say what a verb does, and a path what differs."""

from __future__ import annotations

from typing import Any

from . import _C, arrays
from .checks import require_int, require_seconds
from .handshake import NETWORKS
from .route import Route
from .shape import Config, Placement


def path_of(device: str, config: Config) -> HostPath | LaunchedPath:
    """That of "cpu", "emulated" or "cuda:0"."""
    return HostPath(device, config) if device == "cpu" else LaunchedPath(device, config)


class _Path:
    is_launched: bool  # a verb returns before its work is done
    routes: type  # what a route is in native code

    def __init__(self, device: str, config: Config) -> None:
        self._device, self._config = device, config

    def _require_route(self, argument: str, native: Any, advice: str = "") -> None:
        if not isinstance(native, self.routes):
            raise ValueError(f"{argument}: it was made for another device than {self._device!r}{advice}")

    def _require_no_cuda(self) -> None:
        if self._config.transport == "cuda":
            raise ValueError(
                f"config.transport: device {self._device!r} needs 'auto', 'shm', 'tcp' or 'ucx', got 'cuda'"
            )

    def _require_no_late_network(self, transport: str) -> None:
        if self._config.faults is not None and transport in NETWORKS:
            raise ValueError(
                f"config.faults: signals over {transport!r} cannot be held back yet; use transport='shm', or no "
                "faults (M2N_FAULTS)"
            )

    def _require_direct(self, transport: str, is_possible: bool) -> None:
        if self._config.gpu_direct and not is_possible:
            raise ValueError(
                "config.gpu_direct: rows in the memory of a GPU that NICs reach need transport='ucx' and a device, not "
                f"{transport!r} and {self._device!r}"
            )


class HostPath(_Path):
    """The thread that calls a verb does what it says, and waits in it."""

    is_launched, routes = False, _C.Route

    def transport(self) -> tuple[str, str]:
        """As peers know it, and its native name. Ranks share memory inside a host, and reach others over a network."""
        faults, name = self._config.faults, self._config.transport
        if name == "auto" and faults is not None:
            name = "shm"
        self._require_no_cuda()
        self._require_direct(name, False)
        self._require_no_late_network(name)
        if faults is not None:
            return name, faults._transport(name)
        return name, self._config._network(name, self._device) if name in ("auto", *NETWORKS) else name

    def attention(self, shape: Any, rank: int, max_peers: int, transport: str, placement: Placement) -> Any:
        """A native attention rank."""
        return _C.AttentionComm(shape, rank, max_peers, transport)

    def expert(self, shape: Any, rank: int, max_peers: int, transport: str, experts: list[int]) -> Any:
        """A native expert rank."""
        return _C.ExpertComm(shape, rank, max_peers, transport, experts)

    def set_timeout(self, native: Any, timeout: float) -> None:
        """Each verb is given its own."""

    def launch(self, stream: Any) -> tuple[int, ...]:
        """The last arguments of what may be launched: none."""
        if stream is not None:
            arrays.stream_handle(stream, self._device)  # there is none
        return ()

    def timeout(self, native: Any, timeout: float | None, default: float, launch: tuple[int, ...]) -> float:
        """Of a verb that may be launched, in seconds."""
        if timeout is None:
            return default
        return timeout if type(timeout) is float else require_seconds("timeout", timeout)

    def sms(self, num_sms: int | None, launch: tuple[int, ...]) -> tuple[int, ...]:
        """The last arguments of verbs that move rows: none."""
        return ()

    def received(self, is_synchronous: bool, launch: tuple[int, ...]) -> tuple[Any, ...]:
        """The last arguments of dispatch_recv: none."""
        return ()

    def route(
        self, native: Any, shape: Any, tensors: tuple[Any, Any], num_tokens: Any, out: Any, pack: bool, stream: Any,
        hosts: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        """A native route, built here."""
        topk_ids, topk_weights = tensors if num_tokens is None else (tensor[:num_tokens] for tensor in tensors)
        target = _C.Route(shape) if out is None else out
        self._require_route("out", target)
        target.build_from_topk(arrays.exportable(topk_ids), arrays.exportable(topk_weights), *hosts)
        target.packs = pack
        return target

    def prepare(self, native: Any, route: Route, launch: tuple[int, ...]) -> Any:
        """The native route of a dispatch."""
        self._require_route("route", route._native, "; use comm.route")
        return route._native


class LaunchedPath(_Path):
    """Verbs are launched on a stream, in order, and the host goes on: kernels, or on "emulated" threads of the CPU."""

    is_launched, routes = True, _C.DeviceRoute

    def transport(self) -> tuple[str, str]:
        """As peers know it, and its native name. Ranks on GPUs write into each other's memory there."""
        is_on_gpu, name = self._device.startswith("cuda"), self._config.transport
        if name == "auto":
            name = "cuda" if is_on_gpu else "shm"
        if not is_on_gpu:
            self._require_no_cuda()
        self._require_direct(name, name == "ucx")
        if name == "cuda" and self._config.stream_waits:
            raise ValueError(
                "config.stream_waits: the host must be able to end a stream's wait, which it cannot in the memory of a "
                "GPU; use transport='shm', 'tcp' or 'ucx' on all ranks, or leave out stream_waits (M2N_STREAM_WAITS)"
            )
        self._require_no_late_network(name)
        if self._config.faults is not None:
            raise ValueError(
                f"config.faults: signals of kernels cannot be held back yet, and device {self._device!r} launches "
                "kernels; use device='cpu', or no faults (M2N_FAULTS)"
            )
        if name in NETWORKS:
            return name, self._config._network(name, self._device)
        if name == "cuda":
            return name, self._device
        return name, f"pinned:{self._device}" if is_on_gpu else name

    def attention(self, shape: Any, rank: int, max_peers: int, transport: str, placement: Placement) -> Any:
        """A native attention rank; its kernels know the placement from the beginning."""
        hosts = (placement._offsets, placement._ranks, placement.num_expert_ranks, placement.version)
        return self._made(_C.DeviceAttentionComm(shape, rank, max_peers, transport, self._device, *hosts))

    def expert(self, shape: Any, rank: int, max_peers: int, transport: str, experts: list[int]) -> Any:
        """A native expert rank."""
        return self._made(_C.DeviceExpertComm(shape, rank, max_peers, transport, self._device, experts))

    def _made(self, native: Any) -> Any:
        if self._config.stream_waits:
            native.use_stream_waits()
        return native

    def set_timeout(self, native: Any, timeout: float) -> None:
        """Graphs have it from their next replay on."""
        native.set_timeout(timeout)

    def launch(self, stream: Any) -> tuple[int, ...]:
        """The last arguments of what is launched: the stream."""
        return (arrays.stream_handle(stream, self._device),)

    def timeout(self, native: Any, timeout: float | None, default: float, launch: tuple[int, ...]) -> float:
        """In seconds; below 0 the launch itself reads what set_timeout() has set."""
        if timeout is None:
            return -1.0
        if native.is_capturing(*launch):
            raise ValueError("timeout: verbs of a captured graph have the comm's; use set_timeout, before any replay")
        return require_seconds("timeout", timeout)

    def sms(self, num_sms: int | None, launch: tuple[int, ...]) -> tuple[int, ...]:
        """The last arguments of verbs that move rows."""
        return (self._config.num_sms if num_sms is None else require_int("num_sms", num_sms, 1), *launch)

    def received(self, is_synchronous: bool, launch: tuple[int, ...]) -> tuple[Any, ...]:
        """The last arguments of dispatch_recv."""
        return (is_synchronous, *launch)

    def route(
        self, native: Any, shape: Any, tensors: tuple[Any, Any], num_tokens: Any, out: Any, pack: bool, stream: Any,
        hosts: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        """A native route, built by a launch."""
        if pack:
            raise ValueError(
                f"pack: the kernels of device {self._device!r} write each row where it belongs in the peer's memory, "
                "so there is nothing to pack; leave it out"
            )
        if isinstance(num_tokens, int):
            tensors, num_tokens = (tensors[0][:num_tokens], tensors[1][:num_tokens]), None
        if out is not None:
            self._require_route("out", out)
        so_far = None if num_tokens is None else arrays.exportable(num_tokens)
        return native.make_route(*map(arrays.exportable, tensors), [], so_far, out, *self.launch(stream))

    def prepare(self, native: Any, route: Route, launch: tuple[int, ...]) -> Any:
        """The native route of a dispatch; that of ready-made splits is built by the first one."""
        if route._splits is not None and not isinstance(route._native, self.routes):
            splits, *tensors = route._splits
            route._native = native.make_route(*map(arrays.exportable, tensors), splits, None, None, *launch)
        self._require_route("route", route._native, "; use comm.route")
        return route._native
