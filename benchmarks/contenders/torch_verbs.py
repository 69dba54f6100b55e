# SPDX-License-Identifier: Apache-2.0
"""The four verbs of m2n on torch.distributed (gloo), as grouped send and recv: what a program would do without m2n.

A dispatch is two messages to every expert rank: a header of fixed size with the number of rows, their experts and
weights, and the rows, gathered by destination. The replies come back the same way; their number is known. gloo cannot
say whether a receive has completed, only wait for it. So an attention rank takes replies in the order in which it
dispatched, and an expert rank takes one message of every attention rank at a time, in lockstep.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import m2n

_FIELDS = 3  # of a header, before experts and weights: layer, microbatch, number of rows
_GOODBYE = -1  # as the layer
_HEADER_TAG, _ROWS_TAG, _FIRST_REPLY_TAG = range(3)  # replies have a tag for each microbatch


class TorchRoute(NamedTuple):
    """Where each token goes: by expert rank its tokens, ascending, and the header without layer and microbatch."""

    num_tokens: int
    num_rows: int
    tokens: list[torch.Tensor]
    headers: list[torch.Tensor]


class TorchBatch(NamedTuple):
    """As m2n.Batch, but x holds the rows of this batch only, one attention rank after the other."""

    layer: int
    microbatch: int
    peers: list[int]
    rows_by_peer: list[int]
    num_rows: int
    num_pairs: int
    x: torch.Tensor
    row_index_by_expert: torch.Tensor
    expert_offsets: torch.Tensor
    weights: torch.Tensor


class _Flight(NamedTuple):
    works: list[Any]
    route: TorchRoute
    replies: list[torch.Tensor]
    sent: list[torch.Tensor]  # borrowed by gloo until the works are done


class _TorchComm:
    """What both sides share: the process group, whose first ranks are the attention ranks.

    Args:
        store: a folder on this host, new for each run.
        max_peers: ignored; there are as many peers as the group has.
        attention_ranks: M; every process of the group needs it.

    Raises:
        ValueError: reduce_at="attention", or an expert on several ranks, which this does not do.
    """

    def __init__(
        self,
        rank: int,
        shape: m2n.Shape,
        placement: m2n.Placement,
        store: str,
        max_peers: int,
        config: m2n.Config,
        attention_ranks: int,
    ) -> None:
        if shape.reduce_at != "expert" or any(len(ranks) != 1 for ranks in placement.ranks_of_expert):
            raise ValueError("torch_verbs: expected reduce_at='expert' and one rank for each expert")
        self.rank, self.shape, self.placement, self.attention_ranks = rank, shape, placement, attention_ranks
        self.dispatch_dtype, self.combine_dtype = (
            getattr(torch, dtype) for dtype in (shape.dispatch_dtype, shape.combine_dtype)
        )
        self._bytes_sent = self._bytes_received = 0
        self._num_header_ids = shape.max_tokens * shape.top_k
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}/gloo",
            rank=self._process,
            world_size=attention_ranks + placement.num_expert_ranks,
            timeout=datetime.timedelta(seconds=config.timeout_s),
        )

    @property
    def _process(self) -> int:
        raise NotImplementedError

    def _empty_header(self) -> torch.Tensor:
        return torch.empty(_FIELDS + 2 * self._num_header_ids, dtype=torch.int32)

    def _send(self, tensor: torch.Tensor, process: int, tag: int) -> dist.P2POp:
        self._bytes_sent += tensor.nbytes
        return dist.P2POp(dist.isend, tensor, process, tag=tag)

    def _recv(self, tensor: torch.Tensor, process: int, tag: int) -> dist.P2POp:
        self._bytes_received += tensor.nbytes
        return dist.P2POp(dist.irecv, tensor, process, tag=tag)

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """All ranks are on one host."""
        return {}

    def stats(self) -> dict[str, float]:
        """Bytes in each direction, headers included but for goodbyes; no signal is held back here."""
        moved = {"bytes_sent": self._bytes_sent, "bytes_received": self._bytes_received}
        return {**moved, "signals_held": 0, "held_us": 0.0}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        if exc_type is None:
            self._say_goodbye()
        dist.destroy_process_group()

    def _say_goodbye(self) -> None:
        raise NotImplementedError


def _start(operations: list[dist.P2POp]) -> list[Any]:
    """A group of sends and receives; torch refuses an empty one."""
    works: list[Any] = dist.batch_isend_irecv(operations) if operations else []
    return works


def _wait(works: list[Any]) -> None:
    """Empties the list: gloo would wait a second time for a work that is done."""
    while works:
        works.pop(0).wait()


class TorchAttentionComm(_TorchComm):
    """An attention rank. Errors of gloo are RuntimeError: a peer that is gone, or nothing for config.timeout_s."""

    role = "attention"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        num_experts, num_ranks = self.shape.num_experts, self.placement.num_expert_ranks
        self._rank_of_expert = torch.tensor([ranks[0] for ranks in self.placement.ranks_of_expert])
        self._local_of_expert = torch.empty(num_experts, dtype=torch.int32)
        for rank in range(num_ranks):
            experts = self.placement.experts_of(rank)
            self._local_of_expert[experts] = torch.arange(len(experts), dtype=torch.int32)
        self._processes = [self.attention_ranks + rank for rank in range(num_ranks)]
        self._flights: dict[int, _Flight] = {}  # by microbatch

    @property
    def _process(self) -> int:
        return self.rank

    def route(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> TorchRoute:
        """From int64 ids [T, top_k], none of them padding, and float32 weights [T, top_k]."""
        ranks_TK, local_TK = self._rank_of_expert[topk_ids], self._local_of_expert[topk_ids]
        tokens, headers, num_rows = [], [], 0
        for rank in range(len(self._processes)):
            is_here_TK = ranks_TK == rank
            here = is_here_TK.any(1).nonzero().squeeze(1)
            header, num_ids = self._empty_header(), len(here) * self.shape.top_k
            header[2] = len(here)
            ids, weights = header[_FIELDS:].split(self._num_header_ids)
            ids[:num_ids] = torch.where(is_here_TK, local_TK, -1)[here].flatten()
            weights[:num_ids] = topk_weights[here].flatten().view(torch.int32)
            tokens.append(here)
            headers.append(header)
            num_rows += len(here)
        return TorchRoute(len(topk_ids), num_rows, tokens, headers)

    def dispatch_send(self, x: torch.Tensor, route: TorchRoute, microbatch: int = 0, layer: int = 0) -> None:
        """Starts to send the rows of x [T, hidden], contiguous, and to receive their replies."""
        operations, replies, sent = [], [], [x]
        for process, tokens, header in zip(self._processes, route.tokens, route.headers):
            header[0], header[1] = layer, microbatch
            operations.append(self._send(header, process, _HEADER_TAG))
            replies.append(torch.empty(len(tokens), self.shape.hidden, dtype=self.combine_dtype))
            if len(tokens):
                rows = x if len(tokens) == route.num_tokens else x.index_select(0, tokens)
                sent.append(rows)
                operations.append(self._send(rows, process, _ROWS_TAG))
                operations.append(self._recv(replies[-1], process, _FIRST_REPLY_TAG + microbatch))
        self._flights[microbatch] = _Flight(_start(operations), route, replies, sent)

    def ready(self, microbatch: int) -> bool:
        """Would a dispatch go? Whether replies have come cannot be asked."""
        return microbatch not in self._flights

    def wait_ready(self, microbatches: Sequence[int], timeout: float | None = None) -> int:
        """The first that is not in flight, else the first, after its replies have come."""
        for microbatch in microbatches:
            if self.ready(microbatch):
                return microbatch
        _wait(self._flights[microbatches[0]].works)
        return microbatches[0]

    def combine_recv(self, microbatch: int = 0, timeout: float | None = None) -> torch.Tensor:
        """Waits for the replies and sums them, [T, hidden]; the timeout is that of the process group."""
        flight = self._flights.pop(microbatch)
        _wait(flight.works)
        if len(flight.replies) == 1:  # every token has one reply row, in order
            return flight.replies[0]
        total_TH = torch.zeros(flight.route.num_tokens, self.shape.hidden)
        for tokens, reply in zip(flight.route.tokens, flight.replies):
            total_TH.index_add_(0, tokens, reply.float())
        return total_TH.to(self.combine_dtype)

    def _say_goodbye(self) -> None:
        header = self._empty_header()
        header[0] = _GOODBYE
        _wait(_start([self._send(header, process, _HEADER_TAG) for process in self._processes]))


class TorchExpertComm(_TorchComm):
    """An expert rank. Errors as for TorchAttentionComm."""

    role = "expert"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_experts = len(self.placement.experts_of(self.rank))
        # By attention rank that has not left: the header that is received next. Posted ahead, so that it is there.
        self._next = {rank: self._post_header(rank) for rank in range(self.attention_ranks)}
        self._arrived: list[tuple[int, torch.Tensor]] = []  # attention ranks and headers not yet in a batch
        self._sent: dict[int, tuple[list[Any], torch.Tensor]] = {}  # by microbatch

    @property
    def _process(self) -> int:
        return self.attention_ranks + self.rank

    def _post_header(self, rank: int) -> tuple[list[Any], torch.Tensor]:
        header = self._empty_header()
        return _start([dist.P2POp(dist.irecv, header, rank, tag=_HEADER_TAG)]), header

    def dispatch_recv(self, linger_us: float | None = None, timeout: float | None = None) -> TorchBatch | None:
        """The next batch; None after all attention ranks have left. Waits as long as that of the process group."""
        if not self._arrived:
            self._receive_headers()
        if not self._arrived:
            return None
        # Attention ranks that are not in step have sent other layers or microbatches: those are batches of their own.
        place = self._arrived[0][1][:2].tolist()
        same = [(rank, header) for rank, header in self._arrived if header[:2].tolist() == place]
        self._arrived = [each for each in self._arrived if each[1][:2].tolist() != place]
        return self._receive_rows(*place, same)

    def _receive_headers(self) -> None:
        for rank, (works, header) in list(self._next.items()):
            _wait(works)
            if int(header[0]) == _GOODBYE:
                del self._next[rank]
                continue
            self._bytes_received += header.nbytes
            self._arrived.append((rank, header))
            self._next[rank] = self._post_header(rank)

    def _receive_rows(self, layer: int, microbatch: int, messages: list[tuple[int, torch.Tensor]]) -> TorchBatch:
        counts = [int(header[2]) for _, header in messages]
        x_RH = torch.empty(sum(counts), self.shape.hidden, dtype=self.dispatch_dtype)
        parts = zip(messages, x_RH.split(counts))
        works = _start([self._recv(part, rank, _ROWS_TAG) for (rank, _), part in parts if len(part)])
        columns = [
            [part[: count * self.shape.top_k] for part in header[_FIELDS:].split(self._num_header_ids)]
            for (_, header), count in zip(messages, counts)
        ]
        ids, weights = (torch.cat(column) for column in zip(*columns))
        pairs = (ids >= 0).nonzero().squeeze(1)
        experts, by_expert = ids[pairs].sort(stable=True)
        pairs = pairs[by_expert]
        offsets = torch.zeros(self._num_experts + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(experts, minlength=self._num_experts), 0, out=offsets[1:])
        _wait(works)
        return TorchBatch(
            layer,
            microbatch,
            [rank for rank, _ in messages],
            counts,
            len(x_RH),
            len(pairs),
            x_RH,
            pairs // self.shape.top_k,
            offsets,
            weights[pairs].view(torch.float32),
        )

    def combine_send(self, batch: TorchBatch, y: torch.Tensor) -> None:
        """Starts to send the weighted sums of y [P, hidden], expert-major, to the attention ranks of the batch."""
        if batch.microbatch in self._sent:
            _wait(self._sent[batch.microbatch][0])
        total_RH = torch.zeros(batch.num_rows, self.shape.hidden)
        total_RH.index_add_(0, batch.row_index_by_expert, y.float() * batch.weights[:, None])
        reply = total_RH.to(self.combine_dtype)
        parts = zip(batch.peers, reply.split(batch.rows_by_peer))
        tag = _FIRST_REPLY_TAG + batch.microbatch
        works = _start([self._send(part, rank, tag) for rank, part in parts if len(part)])
        self._sent[batch.microbatch] = works, reply

    def peers(self) -> list[m2n.PeerStatus]:
        """All attention ranks: "live", or "left" when they have said goodbye."""
        ranks = range(self.attention_ranks)
        return [m2n.PeerStatus(rank, "live" if rank in self._next else "left", 0, "") for rank in ranks]

    def _say_goodbye(self) -> None:
        for works, _ in self._sent.values():
            _wait(works)
