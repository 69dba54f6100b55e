# SPDX-License-Identifier: Apache-2.0
"""Trace: what one rank did when, event after event, on a clock that all processes of a host share."""

from __future__ import annotations

import base64
import functools
import threading
import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

# What a rank does, in the words of the verbs. The number of a kind is its place here.
KINDS = (
    "embed",  # attention ranks: a microbatch begins a step
    "attention",
    "route",
    "dense",  # the feed-forward of a layer without experts
    "sample",  # the head, and drawing tokens: a microbatch ends a step
    "dispatch_send",
    "combine_recv",
    "dispatch_recv",  # expert ranks
    "expert",
    "combine_send",
    "wait",  # either: nothing could be done
    "round",  # either, with CUDA graphs: all layers of all microbatches, waits included
)
(
    EMBED, ATTENTION, ROUTE, DENSE, SAMPLE, DISPATCH_SEND, COMBINE_RECV, DISPATCH_RECV, EXPERT, COMBINE_SEND, WAIT,
    ROUND,
) = range(len(KINDS))  # fmt: skip
COMPUTING = (EMBED, ATTENTION, ROUTE, DENSE, SAMPLE, EXPERT)
COMMUNICATING = (DISPATCH_SEND, COMBINE_RECV, DISPATCH_RECV, COMBINE_SEND)

# ranks: the attention ranks in an expert rank's batch, a bit each; 0 on attention ranks; ALL_RANKS where 63 bits are
# too few. step, layer and microbatch are -1 where they have no meaning.
FIELDS = ("kind", "begin_ns", "end_ns", "step", "layer", "microbatch", "num_bytes", "ranks")
ALL_RANKS = -1
# Of one rank: 16 MB. What comes later is counted and not kept.
MAX_EVENTS = 250_000
MAX_DEVICE_EVENTS = 20_000  # CUDA events


class Tracer:
    """Collects the events of one rank. One clock reading and one append per event: about half a microsecond."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._numbers = array("q")
        self._max_numbers = max_events * len(FIELDS)
        self.num_dropped = 0
        self.total_ns = [0] * len(KINDS)

    def now(self) -> Any:
        """The begin of an event, for `add`."""
        return time.monotonic_ns()

    def add(
        self, kind: int, begin_ns: Any, step: int, layer: int, microbatch: int, num_bytes: int = 0, ranks: int = 0
    ) -> Any:
        """Ends an event now; returns now, where the next one may begin."""
        end_ns = time.monotonic_ns()
        self._keep(kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, ranks)
        return end_ns

    def _keep(self, kind: int, begin_ns: int, end_ns: int, *about: int) -> None:
        self.total_ns[kind] += end_ns - begin_ns
        if len(self._numbers) < self._max_numbers:
            self._numbers.extend((kind, begin_ns, end_ns, *about))
        else:
            self.num_dropped += 1

    def seconds(self, kinds: tuple[int, ...]) -> float:
        """Time spent in events of these kinds, dropped ones included."""
        return sum(self.total_ns[kind] for kind in kinds) / 1e9

    def encode(self) -> dict[str, Any]:
        """The events as JSON values, to be sent to whoever collects them."""
        packed = base64.b64encode(zlib.compress(self._numbers.tobytes(), 1)).decode("ascii")
        return {"events": packed, "num_dropped": self.num_dropped}


class DeviceTracer(Tracer):
    """A Tracer of what a GPU does on the current stream, by CUDA events; not for launches that a graph records.

    A receive is one launch or two, of which nobody can tell from outside how long it waited and how long it moved rows:
    all of it counts as waiting, and the receive itself as a moment at its end.

    To make an event, and to end one, may wait for all kernels that run (seen on an H200), also for one that waits for
    this rank. So a tracer is made before anything waits on the device, with all events that it may need, and they go
    back to a pool of the process.
    """

    _pools: ClassVar[dict[str, list[Any]]] = {}  # by device

    def __init__(self, device: str, max_events: int = MAX_DEVICE_EVENTS) -> None:
        import torch

        super().__init__(max_events)
        self._pool = self._pools.setdefault(device, [])
        self._unused = [self._pool.pop() for _ in range(min(max_events, len(self._pool)))]
        self._used: list[Any] = []
        for _ in range(max_events - len(self._unused)):
            self._unused.append(torch.cuda.Event(enable_timing=True))
            self._unused[-1].record()  # it is made now
        with _clock_lock:  # ranks may be threads
            self._origin, self._origin_ns = _device_clock(device)
        self._pending: list[tuple[int, Any, Any, tuple[int, ...]]] = []

    def now(self) -> Any:
        """None when all events are used up."""
        if not self._unused:
            return None
        self._used.append(self._unused.pop())
        self._used[-1].record()
        return self._used[-1]

    def add(
        self, kind: int, begin: Any, step: int, layer: int, microbatch: int, num_bytes: int = 0, ranks: int = 0
    ) -> Any:
        end, about = self.now(), (step, layer, microbatch, num_bytes, ranks)
        if end is None or begin is None:
            self.num_dropped += 1
            return end
        if kind in (COMBINE_RECV, DISPATCH_RECV):
            self._pending.append((WAIT, begin, end, about[:3] + (0, 0)))
            begin = end
        self._pending.append((kind, begin, end, about))
        return end

    def _read(self) -> None:
        """The host waits until all of it has happened."""
        for kind, begin, end, about in self._pending:
            end.synchronize()
            begin_ns, end_ns = (self._origin_ns + round(1e6 * self._origin.elapsed_time(at)) for at in (begin, end))
            self._keep(kind, begin_ns, end_ns, *about)
        self._pending.clear()

    def __del__(self) -> None:
        self._pool += self._unused + self._used

    def seconds(self, kinds: tuple[int, ...]) -> float:
        self._read()
        return super().seconds(kinds)

    def encode(self) -> dict[str, Any]:
        self._read()
        return super().encode()


_clock_lock = threading.Lock()


@functools.cache
def _device_clock(device: str) -> tuple[Any, int]:
    """An event of a GPU and when it was, as time.monotonic_ns() counts: one for all ranks of a process, so that what
    they do there keeps its order."""
    import torch

    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on a stream that is idle; the others may be waiting for this rank
        event.synchronize()
        return event, time.monotonic_ns()


def make_tracer(device: str) -> Tracer:
    """The one for a rank whose tensors lie on this device."""
    return DeviceTracer(device) if device.startswith("cuda") else Tracer()


@dataclass(frozen=True)
class Trace:
    """The events of one rank: int64 [number of events, len(FIELDS)], in the order in which they ended."""

    role: str
    rank: int
    events: np.ndarray
    num_dropped: int = 0

    @classmethod
    def decode(cls, role: str, rank: int, encoded: Mapping[str, Any]) -> Trace:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(encoded["events"])), np.int64)
        return cls(role, rank, numbers.reshape(-1, len(FIELDS)), int(encoded["num_dropped"]))

    def field(self, name: str) -> np.ndarray:
        """One column, int64."""
        return self.events[:, FIELDS.index(name)]

    def of_kind(self, *kinds: int) -> np.ndarray:
        """The events of these kinds, in order."""
        return self.events[np.isin(self.field("kind"), kinds)]


def on_one_clock(traces: Sequence[Trace], ahead_ns: Mapping[int, Mapping[int, int]]) -> list[Trace]:
    """The traces by the clock of the first attention rank.

    ahead_ns: of each attention rank, by how much the clock of each expert rank on another host is ahead of its own.
    Every attention rank is linked with every expert rank, and who is not in the list shares its clock.
    """
    attention = sorted(trace.rank for trace in traces if trace.role == "attention")
    experts = sorted(trace.rank for trace in traces if trace.role == "expert")
    if not attention or not experts or not any(ahead_ns.values()):
        return list(traces)

    def ahead(of: int, expert: int) -> int:
        return ahead_ns.get(of, {}).get(expert, 0)

    shifted = []
    for trace in traces:
        if trace.role == "expert":
            shift_ns = ahead(attention[0], trace.rank)
        else:
            shift_ns = ahead(attention[0], experts[0]) - ahead(trace.rank, experts[0])
        events = trace.events.copy()
        events[:, [FIELDS.index("begin_ns"), FIELDS.index("end_ns")]] -= shift_ns
        shifted.append(replace(trace, events=events))
    return shifted
