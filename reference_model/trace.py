# SPDX-License-Identifier: Apache-2.0
"""Trace: what one rank did when, event after event, on a clock that all processes of a host share."""

from __future__ import annotations

import base64
import time
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
)
EMBED, ATTENTION, ROUTE, DENSE, SAMPLE, DISPATCH_SEND, COMBINE_RECV, DISPATCH_RECV, EXPERT, COMBINE_SEND, WAIT = range(
    len(KINDS)
)
COMPUTING = (EMBED, ATTENTION, ROUTE, DENSE, SAMPLE, EXPERT)
COMMUNICATING = (DISPATCH_SEND, COMBINE_RECV, DISPATCH_RECV, COMBINE_SEND)

# ranks: the attention ranks in an expert rank's batch, a bit each; 0 on attention ranks; ALL_RANKS where 63 bits are
# too few. step, layer and microbatch are -1 where they have no meaning.
FIELDS = ("kind", "begin_ns", "end_ns", "step", "layer", "microbatch", "num_bytes", "ranks")
ALL_RANKS = -1
# Of one rank: 16 MB. What comes later is counted and not kept.
MAX_EVENTS = 250_000


class Tracer:
    """Collects the events of one rank. One clock reading and one append per event: about half a microsecond."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._numbers = array("q")
        self._max_numbers = max_events * len(FIELDS)
        self.num_dropped = 0
        self.total_ns = [0] * len(KINDS)

    now = staticmethod(time.monotonic_ns)

    def add(
        self, kind: int, begin_ns: int, step: int, layer: int, microbatch: int, num_bytes: int = 0, ranks: int = 0
    ) -> int:
        """Ends an event now; returns now, where the next one may begin."""
        end_ns = time.monotonic_ns()
        self.total_ns[kind] += end_ns - begin_ns
        if len(self._numbers) < self._max_numbers:
            self._numbers.extend((kind, begin_ns, end_ns, step, layer, microbatch, num_bytes, ranks))
        else:
            self.num_dropped += 1
        return end_ns

    def seconds(self, kinds: tuple[int, ...]) -> float:
        """Time spent in events of these kinds, dropped ones included."""
        return sum(self.total_ns[kind] for kind in kinds) / 1e9

    def encode(self) -> dict[str, Any]:
        """The events as JSON values, to be sent to whoever collects them."""
        packed = base64.b64encode(zlib.compress(self._numbers.tobytes(), 1)).decode("ascii")
        return {"events": packed, "num_dropped": self.num_dropped}


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
