# SPDX-License-Identifier: Apache-2.0
"""The expert rank's end: ExpertComm with dispatch_recv and combine_send."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from . import _C, arrays, bootstrap
from .checks import require_int, require_version
from .comm import Comm, require_next_placement
from .deadline import Deadline
from .listener import Listener
from .shape import MAX_LAYER, MAX_RANK, Config, Placement, Shape


class Batch:
    """One layer of one microbatch on an expert rank, from one or more attention ranks.

    P is the number of (row, expert) pairs, E_local that of the experts hosted here, R the rows of the whole window.
    Pairs lie expert by expert (ascending global id), within an expert by attention rank's joining and by row.

    Received with sync=False, num_rows and num_pairs are what there is room for, and peers is empty: only the device
    knows how many there are. Lists are that long, what lies behind expert_offsets[-1] are rows that may be read but
    mean nothing, and `counts` says how many there are where the device can use it.

    `experts` are the global ids of the local experts, ascending: those that were hosted when it was received.
    """

    def __init__(
        self,
        native: _C.Batch | _C.DeviceBatch,
        window: Any,
        scales: Any,
        combine_dtype: str,
        library: str,
        counters: dict[str, float],
        experts: list[int],
    ) -> None:
        self._native = native
        self._counters = counters
        self._window = window
        self._scales = scales  # of float8 rows, else None
        self._combine_dtype = combine_dtype
        self._library = library
        self._pid = os.getpid()
        self.layer: int
        self.microbatch: int
        self.num_rows: int
        self.num_pairs: int
        self.peers: list[int]
        self.layer, self.microbatch, self.num_rows, self.num_pairs, self.peers, self._is_counted = native.about
        self.experts = experts

    @property
    def x(self) -> Any:
        """[R, hidden] of shape.dispatch_dtype: the window itself, where the rows landed. Ends with combine_send.

        float8 rows (uint8, their bits, in cupy and in numpy without ml_dtypes) lie apart, their `x_scales` between
        them: not contiguous.

        A child after fork() does not have the window: a tensor taken before must not be read there.
        """
        if self._window is None:
            raise _C.Error("batch.x: combine_send has given the rows back; copy before it what is needed later")
        if os.getpid() != self._pid:
            raise _C.SetupError("batch.x: it was received before fork(); a child does not have its parent's windows")
        return self._window

    @property
    def x_scales(self) -> Any:
        """float32 [R, ceil(hidden / 128)]: the scales of float8 rows, in the window too; else None.

        Element h of row r is float(x[r, h]) * x_scales[r, h // 128]. Strided; ends with combine_send.
        """
        _ = self.x  # for its errors
        return self._scales

    @property
    def row_index_by_expert(self) -> Any:
        """int32 [P]: the row of x for each pair."""
        return arrays.view(self._native.row_index_by_expert, self._library)

    @property
    def expert_offsets(self) -> Any:
        """int32 [E_local + 1]: pairs of local expert e are offsets[e] to offsets[e + 1]."""
        return arrays.view(self._native.expert_offsets, self._library)

    @property
    def weights(self) -> Any:
        """float32 [P]: the router's weight of each pair; combine_send applies it."""
        return arrays.view(self._native.weights, self._library)

    @property
    def counts(self) -> Any:
        """int32 [3], on a device, at a fixed address per microbatch: messages, rows, pairs of the batch."""
        if not isinstance(self._native, _C.DeviceBatch):
            raise ValueError("batch.counts: a batch on the CPU has num_rows and num_pairs")
        return arrays.view(self._native.counts, self._library)

    def gather(self, layout: Literal["expert_major", "padded"] = "expert_major", out: Any = None) -> Any:
        """The one explicit packed copy, for matrix products that need contiguous rows.

        Returns:
            "expert_major": [P, hidden]. "padded": [E_local, most pairs of an expert, hidden], zeros behind the last.
            Of shape.dispatch_dtype; float8 rows become shape.combine_dtype, each element times its scale, one product
            in float32 rounded once. `out` is filled and returned where given.

        Raises:
            ValueError: an unknown layout; an `out` of another shape, or one that is read-only.
        """
        if layout == "padded" and not self._is_counted:
            raise ValueError("layout: 'padded' needs counts on the host; receive with sync=True, or use 'expert_major'")
        x, index = self.x, self.row_index_by_expert
        self._counters["rows_gathered"] += self.num_pairs
        if layout == "expert_major":
            rows = self._take(index)
        elif layout == "padded":
            offsets = self.expert_offsets.tolist()
            counts = [end - begin for begin, end in zip(offsets, offsets[1:])]
            shape = (len(counts), max(counts, default=0), x.shape[1])
            rows = arrays.zeros(shape, self._take(index[:0]))
            for expert, (begin, count) in enumerate(zip(offsets, counts)):
                rows[expert, :count] = self._take(index[begin : begin + count])
        else:
            raise ValueError(f"layout: expected 'expert_major' or 'padded', got {layout!r}")
        if out is None:
            return rows
        try:
            out[...] = rows
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"out: expected a tensor of shape {list(rows.shape)} that can be written: {error}"
            ) from error
        return out

    def _take(self, index: Any) -> Any:
        if self._scales is None:
            return self.x[index]
        return arrays.take_float8(self.x, self._scales, index, self._combine_dtype)


class ExpertComm(Comm):
    """An expert rank: receives tokens where they landed and sends the results back (paper section 5).

    Publishes its address and returns at once; attention ranks join when they come.

    Args:
        rank: of this expert rank, 0 to placement.num_expert_ranks - 1.
        max_peers: attention ranks at one time; each has memory of its own. One that is gone counts until its batches
            are answered. One that was lost counts until recover() or its next life. With one more than there are ranks
            a next life may join while the last one is still there.
        The rest as for AttentionComm.

    Raises:
        SetupError: memory or the store. ValueError, TypeError: naming the argument.
    """

    role = "expert"

    def __init__(
        self,
        rank: int,
        shape: Shape,
        placement: Placement,
        store: Any,
        device: Any = "cpu",
        name: str = "default",
        max_peers: int = 64,
        config: Config | None = None,
    ) -> None:
        super().__init__(rank, shape, placement, name, config, device)
        if self.rank >= placement.num_expert_ranks:
            raise ValueError(f"rank: expected below {placement.num_expert_ranks} (the placement's), got {self.rank}")
        self._library = arrays.choose(self.config.arrays, self.device)
        common = (self._native_shape, self.rank, require_int("max_peers", max_peers, 1), self._transport)
        experts = placement.experts_of(self.rank)
        native = self._path.expert(common, experts)
        self._experts = [experts]  # all that were ever hosted at one time: a batch says which of them it is for
        with self._opened(native) as key:
            opened = self._open_store(store, Deadline(self.config.connect_timeout_s))
            listener = Listener(native, self._identity, self.config.bind)
            try:
                bootstrap.publish(opened, self._identity, listener.address, listener.network_address)
            except BaseException:
                listener.close()
                raise
        self._keep_open(native, listener, key)
        self._window = arrays.view(native.window(), self._library)
        scales = native.scales()
        self._scales = None if scales is None else arrays.view(scales, self._library)

    def dispatch_recv(
        self,
        layer: int | None = None,
        microbatch: int | None = None,
        linger_us: float | None = 50,
        attention_ranks: Sequence[int] | None = None,
        timeout: float | None = None,
        stream: Any = None,
        sync: bool = True,
    ) -> Batch | None:
        """Waits for a batch: one layer of one microbatch, from all attention ranks that have it.

        Args:
            layer, microbatch: take only this one; default: the one whose first message came first.
            linger_us: after the first message, how long to wait for the other attention ranks that are active.
                None: strict lockstep, wait for every rank of `attention_ranks`.
            timeout: seconds; default: config.timeout_s.
            stream: on a GPU, where the rows are to be read: a torch or cupy stream or a raw handle; default: the
                current one. A batch's lists are valid until its combine_send. The receives of one comm run one after
                another; capture those of a graph on one stream.
            sync: on a GPU, wait on the host until the batch is there, so that its numbers are known. False: only
                launch, for given layer and microbatch; lists have full capacity, and when nothing comes in time they
                are left empty and the next call raises Timeout. Needed in a graph capture.

        Returns:
            The batch, or None when none was ready by the timeout: idle is not an error.

        Raises:
            PeerLost: an attention rank died and no batch is ready; recover(peer) goes on without it.
            SlotBusy: sync=False, and the last batch of this microbatch is not answered.
            Timeout: strict, and some but not all have sent. ProtocolError: a peer broke the protocol and was dropped.
        """
        launch = self._path.launch(stream, sync)
        if (linger_us is None) != (attention_ranks is not None):
            raise ValueError("attention_ranks: give it together with linger_us=None (strict lockstep), and only then")
        if linger_us is not None and not 0 <= linger_us <= 1e9:
            raise ValueError(f"linger_us: expected microseconds from 0 to 1e9, got {linger_us!r}")
        if attention_ranks is not None and len(attention_ranks) == 0:
            raise ValueError("attention_ranks: expected at least one")
        if layer is not None:
            layer = require_int("layer", layer, 0, MAX_LAYER)
        if microbatch is not None:
            microbatch = require_int("microbatch", microbatch, 0, self.shape.microbatches - 1)
        seconds = self._path.wait_s if sync else self._path.verb_s
        native = self._native.dispatch_recv(
            layer,
            microbatch,
            linger_us or 0.0,
            ()
            if attention_ranks is None
            else sorted({require_int("attention_ranks", r, 0, MAX_RANK) for r in attention_ranks}),
            seconds(timeout, self._native, launch),
            *launch,
        )
        if native is None:
            return None
        rows = (self._window, self._scales, self.shape.combine_dtype)
        experts = self._experts[native.hosting]
        return Batch(native, *rows, self._library, self._counters, experts)

    def wait_work(self, timeout: float | None = None) -> tuple[int, int] | None:
        """Sleeps until a message waits to be received; its (layer, microbatch), or None at the timeout (seconds)."""
        work: tuple[int, int] | None = self._native.wait_work(self._path.wait_s(timeout), *self._path.launch(None))
        return work

    def combine_send(
        self, batch: Batch, y: Any, reduced: bool = False, stream: Any = None, num_sms: int | None = None
    ) -> None:
        """Sends the results of a batch to the attention ranks they belong to.

        Args:
            batch: from `dispatch_recv`, once.
            y: [P, hidden] expert-major, float32, bfloat16 or float16; unweighted. With `reduced` [num_rows, hidden]
                in the order of arrival (batch.peers, then row): weighted and summed by the caller.
            stream: on a GPU, the one that computes y.
            num_sms: on a GPU, at most so many thread blocks; default: config.num_sms.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        launch = self._path.launch_rows(stream, num_sms)
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: expected m2n.Batch, got {type(batch).__name__}")
        self._native.combine_send(batch._native, arrays.exportable(y), reduced, *launch)
        batch._window = batch._scales = None

    def wait_peer(self, rank: int, timeout: float | None = None) -> bool:
        """Waits until an attention rank has joined; False at the timeout (seconds)."""
        return bool(self._native.wait_peer(require_int("rank", rank, 0), self._path.wait_s(timeout)))

    def set_placement(self, placement: Placement) -> None:
        """Hosts from now on what this placement says, on the CPU: messages are taken and refused by it, also those
        that have arrived and were not received yet.

        A batch that was received before stays as it is, with its own `Batch.experts`, and is answered as ever. Nobody
        is told: attention ranks send what their own placements say. One thread at a time. See `wait_placement`.

        Args:
            placement: with a version that is not below that of the present one. It may leave this rank without experts.

        Raises:
            ValueError: another number of experts, an older version, or a comm on a device. TypeError.
        """
        require_next_placement(placement, self)
        self._experts.append(placement.experts_of(self.rank))
        self._native.set_experts(self._experts[-1])
        self.placement = placement

    def placement_versions(self) -> dict[int, int]:
        """For each live attention rank the newest `Placement.version` that it has shown: 0 before its first message.

        It looks at what has arrived, received or not. The numbers are what peers say; nothing else depends on them.
        On a device the look is a launch, behind the receives that were launched before.

        Raises:
            ProtocolError: a peer broke the protocol and was dropped.
        """
        return dict(self._native.placement_versions(*self._path.launch(None)))

    def wait_placement(self, version: int, timeout: float | None = None) -> None:
        """Waits until every live attention rank has shown this `Placement.version` or a newer one (docs/hosts.md).

        Then no attention rank has anything in flight that went by an older placement, nor will it send such a thing, so
        experts that only older ones put here may go. An attention rank shows a version once it has called
        set_placement, everything that it sent before is combined, and it dispatches again or calls idle(). To move an
        expert from rank 0 to rank 1:

            rank 1         comm.set_placement(Placement([[0, 1]]))             # hosted by both, version as before
            attention      comm.set_placement(Placement([[1]], version=1))     # all of them, when it suits them
            rank 0         comm.wait_placement(1)                              # and answers batches meanwhile
                           comm.set_placement(Placement([[1]], version=1))     # or, to leave: comm.close()

        Whoever waits takes no messages: what went by an older placement must be answered by another thread, or by this
        one between calls with a short timeout (or looks at `placement_versions`). Ranks that join later must have a
        placement as new. Versions are only reported: a rank that lies gets refusals, or is whom a Timeout names.

        Args:
            timeout: seconds; default: config.timeout_s. 0: one look.

        Raises:
            Timeout: naming the first attention rank that has not shown it. PeerLost: one is lost, and another one has
            not shown it; recover(peer) goes on without it. ProtocolError: a peer broke the protocol and was dropped.
            ValueError, TypeError: the version.
        """
        self._native.wait_placement(require_version(version), self._path.wait_s(timeout), *self._path.launch(None))
