# SPDX-License-Identifier: Apache-2.0
"""Which message of one rank is which of another: dispatches, the batches that got them, and what came back.

Ranks number nothing in common, but messages of a microbatch between two ranks keep their order: the k-th
dispatch of microbatch b on attention rank a is the k-th batch with a and b on every expert rank, whose answer
the k-th combine_recv of b on a receives. Events that were dropped are the last ones, so the first still match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..run_config import ATTENTION as ATTENTION_ROLE
from ..trace import COMBINE_RECV, COMBINE_SEND, DISPATCH_RECV, DISPATCH_SEND, EXPERT, FIELDS, WAIT, Trace


@dataclass(frozen=True)
class Batches:
    """The batches that one expert rank answered, as int64 arrays [number of batches]."""

    first: np.ndarray  # the batch's first event, by its place in the trace
    send: np.ndarray  # its combine_send, -1 where the trace ends before
    duration_ns: np.ndarray  # of its dispatch_recv, expert and combine_send
    layer: np.ndarray
    microbatch: np.ndarray
    ranks: np.ndarray  # the attention ranks, a bit each, or ALL_RANKS


@dataclass(frozen=True)
class Link:
    """Messages between an attention rank and an expert rank, as int64 arrays [number of dispatches that arrived]."""

    attention: int  # place in Messages.attention
    expert: int  # place in Messages.experts
    dispatch_send: np.ndarray  # place in the attention rank's trace
    batch: np.ndarray  # place in the expert rank's batches
    combine_recv: np.ndarray  # place in the attention rank's trace, -1 where the trace ends before
    round: np.ndarray  # k: how many dispatches of the same microbatch came before


@dataclass(frozen=True)
class Messages:
    """All messages of a run that both their ends have recorded."""

    attention: list[Trace]
    experts: list[Trace]
    batches: list[Batches]
    links: list[Link]


def match(traces: Sequence[Trace]) -> Messages:
    """Find both ends of every message."""
    attention = sorted((t for t in traces if t.role == ATTENTION_ROLE), key=lambda t: t.rank)
    experts = sorted((t for t in traces if t.role != ATTENTION_ROLE), key=lambda t: t.rank)
    batches = [_batches(trace) for trace in experts]
    links = []
    for a, trace in enumerate(attention):
        sends, recvs = _by_microbatch(trace, DISPATCH_SEND), _by_microbatch(trace, COMBINE_RECV)
        links += [_link(a, e, trace, sends, recvs, of_rank) for e, of_rank in enumerate(batches)]
    return Messages(attention, experts, batches, links)


def _batches(trace: Trace) -> Batches:
    """A batch begins with its dispatch_recv and ends with its combine_send."""
    kind = trace.field("kind")
    first = np.flatnonzero(kind == DISPATCH_RECV)
    batch_of = np.cumsum(kind == DISPATCH_RECV) - 1
    places = np.flatnonzero(np.isin(kind, (DISPATCH_RECV, EXPERT, COMBINE_SEND)) & (batch_of >= 0))
    batch = batch_of[places]
    send = np.full(len(first), -1)
    is_send = kind[places] == COMBINE_SEND
    send[batch[is_send]] = places[is_send]
    duration_ns = np.zeros(len(first), np.int64)
    np.add.at(duration_ns, batch, (trace.field("end_ns") - trace.field("begin_ns"))[places])
    about = [trace.field(name)[first] for name in ("layer", "microbatch", "ranks")]
    return Batches(first, send, duration_ns, *about)


def _by_microbatch(trace: Trace, kind: int) -> dict[int, np.ndarray]:
    """The places of the events of a kind, in order, by microbatch."""
    places = np.flatnonzero(trace.field("kind") == kind)
    microbatch = trace.field("microbatch")[places]
    return {int(b): places[microbatch == b] for b in np.unique(microbatch)}


def _link(
    a: int, e: int, trace: Trace, sends: dict[int, np.ndarray], recvs: dict[int, np.ndarray], batches: Batches
) -> Link:
    # Above 62 there is only ALL_RANKS, whose sign stands for every bit.
    holds_rank = (batches.ranks >> min(trace.rank, 63)) & 1 == 1
    layer = trace.field("layer")
    nothing = np.zeros(0, np.int64)
    parts = [(nothing, nothing, nothing, nothing)]
    for microbatch, sent in sends.items():
        got = np.flatnonzero(holds_rank & (batches.microbatch == microbatch))
        count = min(len(sent), len(got))
        answered = np.full(count, -1)
        places = recvs.get(microbatch, nothing)[:count]
        answered[: len(places)] = places
        # Another layer: a rank was lost on the way, and from here on k is not the same k.
        is_same = np.cumsum(layer[sent[:count]] != batches.layer[got[:count]]) == 0
        parts.append((sent[:count][is_same], got[:count][is_same], answered[is_same], np.arange(count)[is_same]))
    return Link(a, e, *(np.concatenate(column) for column in zip(*parts)))


@dataclass(frozen=True)
class Waits:
    """For each event of a rank the wait right before it, as int64 arrays [events]; -1 where there is none."""

    begin_ns: np.ndarray
    end_ns: np.ndarray
    microbatch: np.ndarray

    @classmethod
    def before(cls, trace: Trace) -> Waits:
        """Waits in a row are one: an idle rank looks up now and then."""
        is_wait = trace.field("kind") == WAIT
        place = np.arange(len(is_wait))
        last_work = np.maximum.accumulate(np.where(is_wait, -1, place))
        waited = np.flatnonzero(is_wait[:-1] & ~is_wait[1:]) + 1
        columns = np.full((3, len(is_wait)), -1)
        columns[0, waited] = trace.field("begin_ns")[last_work[waited - 1] + 1]
        columns[1, waited] = trace.field("end_ns")[waited - 1]
        columns[2, waited] = trace.field("microbatch")[waited - 1]
        return cls(*columns)

    def at(self, places: np.ndarray) -> Waits:
        """Of these events only."""
        return Waits(self.begin_ns[places], self.end_ns[places], self.microbatch[places])

    def only(self, microbatch: np.ndarray) -> Waits:
        """None where the wait was for another microbatch than the event's."""
        columns = (self.begin_ns, self.end_ns, self.microbatch)
        return Waits(*(np.where(self.microbatch == microbatch, column, -1) for column in columns))


class Delays(NamedTuple):
    """How long messages were on their way, in ns, by what their receiver did; int64 arrays."""

    waited_for: np.ndarray  # it waited from before they were sent
    came_late: np.ndarray  # it waited when they came, but not yet when they were sent: the fast ones are missing
    at_most: np.ndarray  # it did something else: they took this long or less

    @classmethod
    def joined(cls, parts: Sequence[Delays]) -> Delays:
        nothing = np.zeros(0, np.int64)
        return cls(*(np.concatenate(column) for column in zip(*parts, (nothing,) * 3)))


def dispatch_delays(messages: Messages) -> Delays:
    """Of dispatches, by batches of an expert rank; only batches that hold all attention ranks."""
    num_senders = sum(bool(np.any(trace.field("kind") == DISPATCH_SEND)) for trace in messages.attention)
    parts = []
    for e, (trace, batches) in enumerate(zip(messages.experts, messages.batches)):
        latest = _Latest(Waits.before(trace).at(batches.first), trace.field("begin_ns")[batches.first])
        for link in (link for link in messages.links if link.expert == e):
            latest.add(link.batch, messages.attention[link.attention].events[link.dispatch_send])
        parts.append(latest.delays(latest.num_begun == num_senders))
    return Delays.joined(parts)


def combine_delays(messages: Messages) -> Delays:
    """Of answers, from the last expert rank's combine_send."""
    num_senders = sum(bool(np.any(batches.send >= 0)) for batches in messages.batches)
    parts = []
    for a, trace in enumerate(messages.attention):
        # A wait may also end as a slot became free for a dispatch: then it names another microbatch.
        waits = Waits.before(trace).only(trace.field("microbatch"))
        latest = _Latest(waits, trace.field("begin_ns"))
        for link in (link for link in messages.links if link.attention == a):
            send = messages.batches[link.expert].send[link.batch]
            is_known = (send >= 0) & (link.combine_recv >= 0)
            latest.add(link.combine_recv[is_known], messages.experts[link.expert].events[send[is_known]])
        parts.append(latest.delays(latest.num_sent == num_senders))
    return Delays.joined(parts)


class _Latest:
    """When the last of the messages was sent that each receiving event needed.

    A message whose sending began after they were there was not needed: nobody waits for an answer without rows.
    """

    def __init__(self, waits: Waits, begin_ns: np.ndarray) -> None:
        self.waits = waits
        self.there_ns = np.where(waits.end_ns >= 0, waits.end_ns, begin_ns)
        self.sent_ns, self.num_sent, self.num_begun = np.zeros((3, len(begin_ns)), np.int64)

    def add(self, receiver: np.ndarray, sends: np.ndarray) -> None:
        """Messages of one sender: the place of the receiving event of each, and their sending events."""
        begin_ns, end_ns = (sends[:, FIELDS.index(name)] for name in ("begin_ns", "end_ns"))
        has_begun = begin_ns < self.there_ns[receiver]
        self.num_sent[receiver] += 1
        self.num_begun[receiver] += has_begun
        self.sent_ns[receiver] = np.maximum(self.sent_ns[receiver], np.where(has_begun, end_ns, 0))

    def delays(self, is_known: np.ndarray) -> Delays:
        is_known = is_known & (self.num_begun > 0)
        has_waited = self.waits.end_ns >= 0
        is_early = self.waits.begin_ns < self.sent_ns
        # A message may be there before the verb that sent it has ended.
        delay_ns = np.maximum(self.there_ns - self.sent_ns, 0)
        cases = (has_waited & is_early, has_waited & ~is_early, ~has_waited)
        return Delays(*(delay_ns[is_known & case] for case in cases))
