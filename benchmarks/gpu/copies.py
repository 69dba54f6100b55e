# SPDX-License-Identifier: Apache-2.0
"""What an exchange between ranks that are streams of one process takes without m2n: cudaMemcpyAsync and events.

A copy for each pair of ranks, in the order of the sender's stream, and behind it an event that the receiver's stream
waits for. It is favoured: rows are gathered before, nobody sums them, and neither ids nor counts go along.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

MAX_STREAMS = 30  # of torch's 32: one is the current one, and one captures graphs


class Streams:
    """A stream for each rank, beside the current one. On a CPU there are none, and everything runs as it is called."""

    def __init__(self, count: int, device: str) -> None:
        self._is_gpu = torch.device(device).type == "cuda"
        # torch has 32 and gives them out again: ranks that share one could wait for themselves.
        if self._is_gpu and count > MAX_STREAMS:
            raise ValueError(f"{count} ranks: torch has streams for {MAX_STREAMS}")
        self._streams = [torch.cuda.Stream() for _ in range(count)] if self._is_gpu else []

    def on(self, rank: int) -> contextlib.AbstractContextManager[Any]:
        """In the block the rank's stream is the current one."""
        return torch.cuda.stream(self._streams[rank]) if self._is_gpu else contextlib.nullcontext()

    def fork(self) -> None:
        """All wait for what the current stream has so far."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """The current stream waits for all."""
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)

    def signal(self, sender: int, receiver: int) -> None:
        """What the sender's stream has so far comes before what the receiver's gets from now on."""
        if self._is_gpu:
            event = torch.cuda.Event()
            event.record(self._streams[sender])
            self._streams[receiver].wait_event(event)


class CopyExchange:
    """M attention ranks, whose streams come first, and N expert ranks: `sources[r][k]` are the rows of r for k."""

    def __init__(self, sources: list[list[torch.Tensor]], streams: Streams) -> None:
        self.sources, self.streams = sources, streams
        self.num_attention, self.num_expert = len(sources), len(sources[0])
        self.windows = [[torch.empty_like(rows) for rows in of_rank] for of_rank in sources]
        self.replies = [[torch.empty_like(rows) for rows in of_rank] for of_rank in sources]

    def dispatch(self) -> None:
        """Between a fork and a join of the streams, as answer()."""
        for r, of_rank in enumerate(self.sources):
            for k, rows in enumerate(of_rank):
                with self.streams.on(r):
                    self.windows[r][k].copy_(rows)
                self.streams.signal(r, self.num_attention + k)

    def answer(self) -> None:
        """The rows go back as they came."""
        for k in range(self.num_expert):
            for r in range(self.num_attention):
                with self.streams.on(self.num_attention + k):
                    self.replies[r][k].copy_(self.windows[r][k])
                self.streams.signal(self.num_attention + k, r)

    def round_trip(self) -> None:
        self.streams.fork()
        self.dispatch()
        self.answer()
        self.streams.join()
