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

_Common = tuple[_C.Shape, int, int, str]  # what every native comm is made with: shape, rank, max_peers, transport


def path_of(device: str, config: Config) -> HostPath | LaunchedPath:
    """That of "cpu", "emulated" or "cuda:0"."""
    return HostPath(device, config) if device == "cpu" else LaunchedPath(device, config)


class _Path:
    is_launched: bool  # a verb returns before its work is done

    def __init__(self, device: str, config: Config) -> None:
        self._device, self._config = device, config
        self.timeout_s = config.timeout_s  # of verbs and waits that are given none

    def transport(self) -> tuple[str, str]:
        """As peers know it, and its native name."""
        config, device = self._config, self._device
        # Ranks on GPUs write into each other's memory there; all others share memory of the host.
        is_on_gpu = device.startswith("cuda")
        name: str = config.transport
        if name == "auto":
            # Ranks on CPUs share memory inside a host, and reach other hosts over a network.
            name = "cuda" if is_on_gpu else "shm" if self.is_launched or config.faults is not None else "auto"
        if name == "cuda" and not is_on_gpu:
            raise ValueError(f"config.transport: device {device!r} needs 'auto', 'shm', 'tcp' or 'ucx', got 'cuda'")
        if config.gpu_direct and (name != "ucx" or not self.is_launched):
            raise ValueError(
                "config.gpu_direct: rows in the memory of a GPU that NICs reach need transport='ucx' and a device, not "
                f"{name!r} and {device!r}"
            )
        if name == "cuda" and config.stream_waits:
            raise ValueError(
                "config.stream_waits: the host must be able to end a stream's wait, which it cannot in the memory of a "
                "GPU; use transport='shm', 'tcp' or 'ucx' on all ranks, or leave out stream_waits (M2N_STREAM_WAITS)"
            )
        if config.faults is not None:
            if name in NETWORKS:
                raise ValueError(
                    f"config.faults: signals over {name!r} cannot be held back yet; use transport='shm', or no "
                    "faults (M2N_FAULTS)"
                )
            if self.is_launched:
                raise ValueError(
                    f"config.faults: signals of kernels cannot be held back yet, and device {device!r} launches "
                    "kernels; use device='cpu', or no faults (M2N_FAULTS)"
                )
            return name, config.faults._transport(name)
        if name in ("auto", *NETWORKS):
            return name, config._network(name, device)
        return name, name if not is_on_gpu else device if name == "cuda" else f"pinned:{device}"

    def set_timeout(self, native: Any, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def wait_s(self, timeout: float | None, *_: Any) -> float:
        """How long the thread that calls waits, in seconds."""
        if timeout is None:
            return self.timeout_s
        return timeout if type(timeout) is float else require_seconds("timeout", timeout)

    def adopt(self, native: Any, route: Route, launch: tuple[Any, ...]) -> None:
        """Makes a route that was made elsewhere one of this path."""
        raise ValueError(f"route: it was made for another device than {self._device!r}; use comm.route")


class HostPath(_Path):
    """The thread that calls a verb does what it says, and waits in it."""

    is_launched, routes = False, _C.Route
    verb_s = _Path.wait_s

    def attention(self, common: _Common, placement: Placement) -> Any:
        """A native attention rank."""
        return _C.AttentionComm(*common)

    def expert(self, common: _Common, experts: list[int]) -> Any:
        """A native expert rank."""
        return _C.ExpertComm(*common, experts)

    def launch(self, stream: Any, *options: Any) -> tuple[Any, ...]:
        """The last arguments of what may be launched: none."""
        return () if stream is None else (arrays.stream_handle(stream, self._device),)  # raises: there is none

    launch_rows = launch

    def route(self, comm: Any, ids: Any, weights: Any, num_tokens: Any, out: Route | None, pack: bool, _: Any) -> Route:
        """A route that is built here."""
        if num_tokens is not None:
            ids, weights = ids[:num_tokens], weights[:num_tokens]
        route = Route(_C.Route(comm._native_shape)) if out is None else out
        native: Any = route._native
        table, num_ranks, route._version = comm._placed
        native.build_from_topk(arrays.exportable(ids), arrays.exportable(weights), table, num_ranks, comm.rank, pack)
        return route


class LaunchedPath(_Path):
    """Verbs are launched on a stream, in order, and the host goes on: kernels, or on "emulated" threads of the CPU."""

    is_launched, routes = True, _C.DeviceRoute

    def attention(self, common: _Common, placement: Placement) -> Any:
        """A native attention rank; its kernels know the placement from the beginning."""
        hosts = (placement._offsets, placement._ranks, placement.num_expert_ranks, placement.version)
        return self._made(_C.DeviceAttentionComm(*common, self._device, *hosts))

    def expert(self, common: _Common, experts: list[int]) -> Any:
        """A native expert rank."""
        return self._made(_C.DeviceExpertComm(*common, self._device, experts))

    def _made(self, native: Any) -> Any:
        if self._config.stream_waits:
            native.use_stream_waits()
        return native

    def set_timeout(self, native: Any, timeout_s: float) -> None:
        """Graphs have it from their next replay on."""
        super().set_timeout(native, timeout_s)
        native.set_timeout(timeout_s)

    def launch(self, stream: Any, *options: Any) -> tuple[Any, ...]:
        """The last arguments of what is launched."""
        return (*options, arrays.stream_handle(stream, self._device))

    def launch_rows(self, stream: Any, num_sms: int | None) -> tuple[Any, ...]:
        """Of verbs that move rows."""
        num_sms = self._config.num_sms if num_sms is None else require_int("num_sms", num_sms, 1)
        return (num_sms, arrays.stream_handle(stream, self._device))

    def verb_s(self, timeout: float | None, native: Any, launch: tuple[Any, ...]) -> float:
        """Below 0 the launch itself reads what set_timeout() has set."""
        if timeout is not None and native.is_capturing(launch[-1]):
            raise ValueError("timeout: verbs of a captured graph have the comm's; use set_timeout, before any replay")
        return -1.0 if timeout is None else require_seconds("timeout", timeout)

    def route(
        self, comm: Any, ids: Any, weights: Any, num_tokens: Any, out: Route | None, pack: bool, stream: Any
    ) -> Route:
        """A route that is built by a launch."""
        if pack:
            raise ValueError(
                f"pack: the kernels of device {self._device!r} write each row where it belongs in the peer's memory, "
                "so there is nothing to pack; leave it out"
            )
        if isinstance(num_tokens, int):
            ids, weights, num_tokens = ids[:num_tokens], weights[:num_tokens], None
        handle = arrays.stream_handle(stream, self._device)
        so_far = None if num_tokens is None else arrays.exportable(num_tokens)
        tensors = (arrays.exportable(ids), arrays.exportable(weights))
        native = comm._native.make_route(*tensors, [], so_far, None if out is None else out._native, handle)
        if out is None:
            return Route(native)
        out._splits = None
        return out

    def adopt(self, native: Any, route: Route, launch: tuple[Any, ...]) -> None:
        """Routes of ready-made splits are built by their first dispatch."""
        if route._splits is None:
            super().adopt(native, route, launch)
            return
        splits, *tensors = route._splits
        route._native = native.make_route(*map(arrays.exportable, tensors), splits, None, None, launch[-1])
