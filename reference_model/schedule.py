# SPDX-License-Identifier: Apache-2.0
"""The ping-pong pipeline as data: the order in which an attention rank works on its microbatches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

# Attention of a layer; its tokens then go to the experts, or through the dense part the layer has instead.
ATTEND = "attend"
# Until one of `waiting` is ready; whoever carries the schedule out sends which one it was.
WAIT = "wait"
# Take the answer of the experts and end the layer.
COMBINE = "combine"


class Action(NamedTuple):
    """One thing to do; waiting: the microbatches whose tokens are with the experts, longest ago first."""

    step: int
    layer: int
    microbatch: int
    kind: str
    waiting: tuple[int, ...] = ()


def ping_pong(
    step: int, moe_layers: Sequence[bool], microbatches: Sequence[int]
) -> Generator[Action, int | None, None]:
    """Yield the actions of one step: every microbatch through every layer, each in layer order.

    While the tokens of one microbatch are with the experts, the others' attention is computed. After a WAIT
    the caller may send the microbatch that is ready; plain iteration takes the one that has waited longest,
    the order of the MegaScale-Infer paper. Layers without experts (moe_layers is False) need no wait.
    """
    waiting: list[int] = []
    layer_of = dict.fromkeys(microbatches, 0)

    def advance(microbatch: int) -> Generator[Action, int | None, None]:
        """Attend until tokens have gone to the experts or no layer is left."""
        while layer_of[microbatch] < len(moe_layers):
            layer = layer_of[microbatch]
            yield Action(step, layer, microbatch, ATTEND)
            if moe_layers[layer]:
                waiting.append(microbatch)
                return
            layer_of[microbatch] += 1

    for microbatch in microbatches:
        yield from advance(microbatch)
    while waiting:
        oldest = waiting[0]
        ready = yield Action(step, layer_of[oldest], oldest, WAIT, tuple(waiting))
        microbatch = oldest if ready is None else ready
        waiting.remove(microbatch)
        yield Action(step, layer_of[microbatch], microbatch, COMBINE)
        layer_of[microbatch] += 1
        yield from advance(microbatch)
