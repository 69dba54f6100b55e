# SPDX-License-Identifier: Apache-2.0
"""The ping-pong pipeline as data: what an attention rank and an expert rank do next (MegaScale-Infer, section 4.1).

Schedules are generators of actions, and are sent what each action brought. `carry_out` does that for everybody: the
engines, which differ in what they do for an action, and the simulator (simulate.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Attention ranks.
BEGIN = "begin"  # Take the tokens of the microbatch's next step; send True if there are any.
ATTEND = "attend"  # Attention of a layer, and its route; or the dense part that the layer has instead of experts.
DISPATCH = "dispatch_send"  # Its tokens go to the experts.
COMBINE = "combine_recv"  # Take the answer of the experts and end the layer.
END = "end"  # The last layer is done: draw the new tokens.
POLL = "poll"  # Send which of `waiting` can go on, the first if several, or None: there is something else to do.
WAIT = "wait"  # The same, but there is nothing else to do: sleep until one can.
# Expert ranks.
RECEIVE = "dispatch_recv"  # Send the (layer, microbatch) that was received, or None at the end of the run.
EXPERT = "expert"
REPLY = "combine_send"


class Action(NamedTuple):
    """One thing to do. Steps count per microbatch, from 0; waiting is for POLL and WAIT only."""

    kind: str
    step: int = -1
    layer: int = -1
    microbatch: int = -1
    waiting: tuple[int, ...] = ()


Schedule = Generator[Action, Any, None]
LATER = object()


def carry_out(schedule: Schedule, do: Mapping[str, Callable[[Action], Any]]) -> Iterator[tuple[Action, Any]]:
    """Do what a schedule says, by a function for each kind of action; the schedule is sent what that returns.

    Yields (action, what it brought) after each. LATER: it cannot be done yet, and is tried again next.
    """
    answer: Any = None
    while True:
        try:
            action = schedule.send(answer)
        except StopIteration:
            return
        while (answer := do[action.kind](action)) is LATER:
            yield action, LATER
        yield action, answer


def walk(
    moe_layers: Sequence[bool], microbatch: int = 0, step: int = 0, layers: Sequence[int] | None = None
) -> Schedule:
    """Yield what becomes of one microbatch, layer by layer. All schedules are made of such walks.

    layers: these only (default: all).
    """
    for layer in range(len(moe_layers)) if layers is None else layers:
        yield Action(ATTEND, step, layer, microbatch)
        if moe_layers[layer]:
            yield Action(DISPATCH, step, layer, microbatch)
            yield Action(COMBINE, step, layer, microbatch)


def attention_schedule(moe_layers: Sequence[bool], num_microbatches: int) -> Schedule:
    """Yield what an attention rank does, until no microbatch has tokens and none is with the experts.

    While the tokens of one microbatch are with the experts the others are computed, across steps too: a microbatch
    begins its next step while others are still in theirs. WAIT comes only when nothing can be computed. A microbatch
    that had no tokens is asked again when another one has ended a step. Where WAIT is answered with None the first
    of `waiting` goes on: the one that has waited longest, the order of the paper.

    Args:
        moe_layers: for each layer of the model whether it has experts; the others need no dispatch.

    Raises:
        ValueError: no layers or no microbatches.
    """
    if not moe_layers:
        raise ValueError("moe_layers: expected at least one layer")
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches: expected at least 1, got {num_microbatches}")
    return _attention_schedule(moe_layers, num_microbatches)


def _attention_schedule(moe_layers: Sequence[bool], num_microbatches: int) -> Schedule:
    step_of, to_begin = [0] * num_microbatches, deque(range(num_microbatches))
    walks: dict[int, Schedule] = {}  # of those that are in a step
    # What each of them does next: DISPATCH, but its slot may still await the answer to an empty message, or COMBINE.
    # Longest ago first.
    awaited: dict[int, Action] = {}
    idle: list[int] = []  # had no tokens when it was last asked
    while True:
        # Tokens that are to leave come first: experts that have nothing to do cost most. Then steps that begin: a
        # microbatch that is left behind would run alone at the end.
        waiting = tuple(microbatch for microbatch, action in awaited.items() if action.kind == DISPATCH)
        if not to_begin:
            waiting += tuple(microbatch for microbatch in awaited if microbatch not in waiting)
        ready = (yield Action(POLL if to_begin else WAIT, waiting=waiting)) if waiting else None
        if ready is not None or not to_begin:
            if not waiting:
                return
            microbatch = waiting[0] if ready is None else ready
            yield awaited.pop(microbatch)
        else:
            microbatch = to_begin.popleft()
            if not (yield Action(BEGIN, step_of[microbatch], 0, microbatch)):
                idle.append(microbatch)
                continue
            walks[microbatch] = walk(moe_layers, microbatch, step_of[microbatch])
        for action in walks[microbatch]:
            if action.kind != ATTEND:
                awaited[microbatch] = action
                break
            yield action
        else:
            yield Action(END, step_of[microbatch], len(moe_layers), microbatch)
            step_of[microbatch] += 1
            # What this one leaves may be the next step of another.
            to_begin.extend((microbatch, *idle))
            idle.clear()


def expert_schedule() -> Schedule:
    """Yield what an expert rank does: it serves whatever is ready, until RECEIVE is answered with None."""
    while True:
        work = yield Action(RECEIVE)
        if work is None:
            return
        layer, microbatch = work
        yield Action(EXPERT, layer=layer, microbatch=microbatch)
        yield Action(REPLY, layer=layer, microbatch=microbatch)


def round_schedule(moe_layers: Sequence[bool], num_microbatches: int, step: int = 0) -> Schedule:
    """Yield what an attention rank does in a round: one step of every microbatch, in an order that does not depend on
    when answers come. Expert ranks are asked for (layer, microbatch) in the order of `served_in_round`."""
    walks = [walk(moe_layers, microbatch, step) for microbatch in range(num_microbatches)]
    for _ in range(len(moe_layers) + 1):  # the last answers come after the last layer
        for actions in walks:
            for action in actions:
                yield action
                if action.kind == DISPATCH or action.kind == ATTEND and not moe_layers[action.layer]:
                    break


def served_in_round(moe_layers: Sequence[bool], num_microbatches: int) -> list[tuple[int, int]]:
    """The (layer, microbatch) of a round, as experts are asked for them."""
    actions = round_schedule(moe_layers, num_microbatches)
    return [(action.layer, action.microbatch) for action in actions if action.kind == DISPATCH]
