# SPDX-License-Identifier: Apache-2.0
"""The experts of other ranks, as an attention side reaches them: through m2n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import m2n

from ..model.precision import dispatch_bytes


class RemoteExperts:
    """The experts of other ranks (`model.experts.Experts`), reached through an m2n.AttentionComm.

    is_launched: its verbs are launches on a device, which wait there in the order of the stream. The host asks for
    nothing then: to look whether an answer has come, it would have to wait for what it has launched before.
    """

    def __init__(self, comm: m2n.AttentionComm, timeout_s: float, is_launched: bool = False) -> None:
        self.comm, self.timeout_s, self.is_launched = comm, timeout_s, is_launched

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, **options: Any) -> m2n.Route:
        return self.comm.route(ids_TK, weights_TK, **options)

    def make_route(self, num_tokens: int, device: str) -> m2n.Route:
        """Memory for a route of so many tokens; none of them goes anywhere yet."""
        shape = (num_tokens, self.comm.shape.top_k)
        return self.comm.route(torch.full(shape, -1, device=device), torch.zeros(shape, device=device))

    def dispatch(self, x_TH: torch.Tensor, route: m2n.Route, layer: int, microbatch: int) -> tuple[int, int]:
        # x is borrowed by m2n until combine_recv; it holds the tensor.
        self.comm.dispatch_send(x_TH, route, microbatch=microbatch, layer=layer)
        if self.is_launched:
            return 0, 0  # how many rows there are is known on the device only
        shape = self.comm.shape
        num_replies = route.num_rows if shape.reduce_at == "expert" else route.num_tokens * shape.top_k
        return route.num_rows * dispatch_bytes(shape), num_replies * x_TH.shape[1] * x_TH.element_size()

    def ready(self, microbatches: Sequence[int]) -> int | None:
        if self.is_launched:
            return microbatches[0]  # the one that has waited longest, the order of the paper
        return next((microbatch for microbatch in microbatches if self.comm.ready(microbatch)), None)

    def wait_ready(self, microbatches: Sequence[int]) -> int:
        microbatch = self.comm.wait_ready(microbatches, self.timeout_s)
        # Nobody in time: the verb of the oldest says which peer is missing.
        return microbatches[0] if microbatch is None else microbatch

    def combine(self, microbatch: int) -> torch.Tensor:
        # On the CPU it was ready, or has been waited for as long as anybody should.
        timeout_s = None if self.is_launched else 0.0
        y_TH: torch.Tensor = self.comm.combine_recv(microbatch=microbatch, timeout=timeout_s)
        return y_TH

    def check(self) -> None:
        if self.is_launched:  # a launch raises nothing: rows that are missing are NaN
            self.comm.check()
