# SPDX-License-Identifier: Apache-2.0
"""The attention rank's end: AttentionComm with dispatch_send and combine_recv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from . import arrays, bootstrap
from .checks import require_int, require_seconds
from .comm import Comm, require_next_placement
from .deadline import Deadline
from .route import Route
from .shape import MAX_LAYER, Config, Placement, Shape


class AttentionComm(Comm):
    """An attention rank: sends tokens to their experts and gets the weighted results back (paper section 5).

    Connects to every expert rank of the placement (`Placement.members`) and waits for those that have not started yet.

    Args:
        rank: of this attention rank, from 0.
        shape, placement: equal on all ranks of the comm.
        store: a path, "tcp://host:port", or an object with set, get and wait.
        device: "cpu", "cuda:0" or "emulated". On a GPU verbs are launched on the caller's stream and return at once.
            What goes wrong in one is raised by the next call or check(). Ranks on GPUs may be threads or processes.
            "emulated" runs the kernels on CPU threads, to test without a GPU.
        name: separates several comms of one job.
        max_peers: expert ranks at one time. One that is gone counts until what it owed is combined. One that was lost
            counts until recover() or its next life.
        config: deadlines and more.

    Raises:
        SetupError: a peer was not there by config.connect_timeout_s, or refused; the store cannot be reached.
        ValueError, TypeError: naming the argument.
    """

    role = "attention"

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
        deadline = Deadline(self.config.connect_timeout_s)
        self._borrowed: dict[int, tuple[Any, Route, int]] = {}  # with the version of the placement it went by
        self._shown = placement.version  # what messages tell: see _version_to_show()
        self._num_ranks = placement.num_expert_ranks  # whoever is linked hears of every dispatch
        self._placed = (placement._native(), self._num_ranks, placement.version)  # what routes go by
        common = (self._native_shape, self.rank, require_int("max_peers", max_peers, 1), self._transport)
        native = self._native = self._path.attention(common, placement)
        with self._opened(native) as key:
            opened = self._open_store(store, deadline)
            bootstrap.publish(opened, self._identity)
            for expert_rank in placement.members:
                bootstrap.connect(native, self._identity, opened, expert_rank, deadline)
            native.set_hosts(placement.hosts)
        self._store = opened
        self._keep_open(native, None, key)

    def route(
        self,
        topk_ids: Any,
        topk_weights: Any,
        num_tokens: Any = None,
        out: Route | None = None,
        stream: Any = None,
        pack: bool = False,
    ) -> Route:
        """Where each token goes, from the router's top-k. On a GPU one kernel, which the host does not wait for.

        Args:
            topk_ids: int32 or int64 [T, top_k], global expert ids, all different in a row; -1 is padding.
            topk_weights: float [T, top_k].
            num_tokens: use only the first so many rows. On a GPU it may be an int32 or int64 tensor of one element
                there: the route keeps T tokens, and those behind are padding, whose results are 0.
            out: a route whose memory, and on a GPU whose addresses, are used again; it must not be in flight.
                In a graph capture it is required.
            stream: on a GPU, as for dispatch_send.
            pack: copy the rows of each expert rank side by side before they are sent over a network: one run of bytes a
                rank, the paper's section 6. x is then the caller's again when `dispatch_send` returns. The bytes are
                counted (`stats()["bytes_packed"]`). Over TCP it pays where the rows of a rank lie apart in x and are
                less than 512 KB together: 0.5 to 0.7 of the time with rows of 1 KB, 0.9 with longer ones. With more it
                takes up to 1.7 times as long (benchmarks/README.md), and only x is gained. Nothing is packed where
                memory is shared, nor where rows become float8, and x is free as early there.

        Raises:
            ValueError: shapes, ids out of range or twice in a row, weights that are not finite, more than
                shape.max_tokens tokens; pack on a device, whose kernels write each row where it belongs. TypeError:
                dtypes. On a GPU what is wrong with values is raised by the next call, nothing is sent, and the results
                are NaN.
        """
        if out is not None:
            lent = () if self._path.is_launched else list(self._borrowed.values())
            if any(route is out for _, route, _ in lent):
                raise ValueError("out: this route is in flight; call combine_recv for its microbatch first")
            if not isinstance(out._native, self._path.routes):
                raise ValueError(f"out: it was made for another device than {self.device!r}")
        return self._path.route(self, topk_ids, topk_weights, num_tokens, out, pack, stream)

    def dispatch_send(
        self,
        x: Any,
        route: Route,
        microbatch: int = 0,
        layer: int = 0,
        stream: Any = None,
        num_sms: int | None = None,
    ) -> None:
        """Writes each token's row into the window of every expert rank it goes to.

        Args:
            x: [T, hidden] of shape.dispatch_dtype, or of float32, bfloat16 or float16 where that is float8; rows may
                be strided. Borrowed: it must not change until `combine_recv` of this microbatch has returned; unless
                the route packs, then it is the caller's again when this returns.
            route: for the same T tokens.
            microbatch: 0 to shape.microbatches - 1; the slot that is used.
            layer: goes with the message; expert ranks batch by (layer, microbatch).
            stream: on a GPU, a torch or cupy stream or a raw handle; default: the current one. Verbs of one microbatch
                are ordered among each other on whatever streams, but for those of captured graphs; x and the results
                are ordered by this stream alone.
            num_sms: on a GPU, at most so many thread blocks; default: config.num_sms.

        Raises:
            SlotBusy: this microbatch is in flight. PeerLost: an expert rank that gets rows is lost or has left.
            Timeout: an expert rank has not answered this slot's last, empty message. ValueError, TypeError; a route
            that was made before set_placement brought a newer version is a ValueError.
            On a device the next call raises what a launch has found.
        """
        launch = self._path.launch_rows(stream, num_sms)
        if not isinstance(route, Route):
            raise TypeError(f"route: expected m2n.Route, got {type(route).__name__}")
        if not isinstance(route._native, self._path.routes):
            self._path.adopt(self._native, route, launch)
        version = self.placement.version
        if route._version is not None and route._version < version:
            raise ValueError(
                f"route: it was made for version {route._version} of the placement, and this comm has {version} by now "
                "(set_placement); make it again with comm.route"
            )
        native: Any = route._native
        wait_s, shown = self._path.verb_s(None, self._native, launch), self._version_to_show()
        try:
            self._native.dispatch_send(arrays.exportable(x), native, microbatch, layer, wait_s, shown, *launch)
        except TypeError:
            self._require_numbers(microbatch, layer)
            raise
        if not self._path.is_launched and native.packs:
            x = arrays.empty(0, self.shape.hidden, self.shape.combine_dtype, x)  # its library is all that is kept
        self._borrowed[microbatch] = (x, route, version)

    def _require_numbers(self, microbatch: Any, layer: Any = 0) -> None:
        """Why native code did not take these: raises by name. Not before each call, which it would slow."""
        require_int("microbatch", microbatch, 0, self.shape.microbatches - 1)
        require_int("layer", layer, 0, MAX_LAYER)

    def _version_to_show(self) -> int:
        """What messages tell: the version of the oldest placement by which rows of this rank still go, or went and are
        not combined. So whoever has seen it need not host what only older placements put there, and no message that
        overtakes another tells it too early."""
        version = self.placement.version
        if self._shown != version:
            self._shown = min([version, *(sent for _, _, sent in list(self._borrowed.values()))])
        return self._shown

    def combine_recv(
        self,
        microbatch: int = 0,
        out: Any = None,
        timeout: float | None = None,
        stream: Any = None,
        num_sms: int | None = None,
        missing: Literal["raise", "nan"] = "raise",
    ) -> Any:
        """Waits for the results of a microbatch and sums them.

        Args:
            out: [T, hidden] of shape.combine_dtype to be filled; default: a new tensor of the library x came from.
            timeout: seconds; default: config.timeout_s, or what set_timeout() has set; not in a graph capture.
            stream, num_sms: on a GPU, as for dispatch_send. One block waits, and then so many sum.
            missing: what becomes of tokens whose rows will not come, as their expert rank is gone. "raise": the batch
                stays in flight, also after `recover`. "nan": they are NaN once all other rows are there.

        Returns:
            [T, hidden]: for each token the weighted sum over its experts; 0 for a padded token.

        Raises:
            PeerLost: an expert rank is gone and owes rows; its attribute `missing` is what `missing()` says.
            Timeout: one is alive but late; call again, or drop() it.
            ProtocolError: one refused the message (it names the expert) or broke the protocol.
            On a device the next call raises it, and the rows that are missing are NaN in any case.
        """
        launch = self._path.launch_rows(stream, num_sms)
        if missing not in ("raise", "nan"):
            raise ValueError(f"missing: expected 'raise' or 'nan', got {missing!r}")
        try:
            num_tokens = self._native.num_tokens(microbatch)
        except TypeError:
            self._require_numbers(microbatch)
            raise
        if out is None:
            out = arrays.empty(num_tokens, self.shape.hidden, self.shape.combine_dtype, self._borrowed[microbatch][0])
        try:
            wait_s = self._path.verb_s(timeout, self._native, launch)
            self._native.combine_recv(arrays.exportable(out, True), microbatch, wait_s, missing == "nan", *launch)
        except BaseException:
            native = self._native
            if not (self._path.is_launched or native.is_closed or native.is_busy(microbatch)):
                self._borrowed.pop(microbatch, None)
            raise
        if not self._path.is_launched:  # there it may still have to run, or be called again: a dispatch ends the loan
            self._borrowed.pop(microbatch, None)
        return out

    def missing(self, microbatch: int = 0) -> dict[int, list[int]]:
        """Of what is in flight, for each expert rank that will not answer any more the tokens (rows of x) whose rows it
        owes. Empty: nothing is missing so far, or nothing is in flight. To be asked by the thread that drives the
        microbatch.

        Raises:
            ValueError: a comm on a device, where only the kernels know; their rows are NaN. Or no such microbatch.
        """
        if self._path.is_launched:
            raise ValueError(
                f"missing: on device {self.device!r} only the kernels know which rows have not come; the results of "
                "combine_recv are NaN there"
            )
        return dict(self._native.missing(require_int("microbatch", microbatch, 0)))

    def ready(self, microbatch: int) -> bool:
        """Would the next verb of this microbatch go without waiting?

        In flight: would `combine_recv` return, or raise? With nothing in flight: would `dispatch_send` go, or is there
        still an empty message that an expert rank has not answered? On a device a dispatch never waits on the host.
        To be asked by the thread that drives the microbatch.
        """
        try:
            return bool(self._native.ready(microbatch, *self._path.launch(None)))
        except TypeError:
            self._require_numbers(microbatch)
            raise

    def wait_ready(self, microbatches: Sequence[int], timeout: float | None = None) -> int | None:
        """Sleeps until one of these microbatches is `ready` and returns it; None at the timeout (seconds).

        Of several that are ready it is the first in the given order. None of them may be driven by another thread.
        """
        try:
            position = self._native.wait_ready(list(microbatches), self._path.wait_s(timeout), *self._path.launch(None))
        except TypeError:
            for microbatch in microbatches:
                self._require_numbers(microbatch)
            raise
        return None if position < 0 else microbatches[position]

    def set_placement(self, placement: Placement, timeout: float | None = None) -> None:
        """From the next `route` on experts are where this placement says, on the CPU (docs/hosts.md).

        Expert ranks that it names (`Placement.members`) and that are not linked are joined first. They are new ones,
        next lives of those that have left, and those whose link is lost, which is given up as by `recover`. Other links
        go on, and what is in flight is combined as it was sent. Not while another thread is in `dispatch_send`.

        With a higher `Placement.version` routes that were made before can no longer be dispatched, and messages tell
        the expert ranks the new version from when everything that was sent before is combined: see
        `ExpertComm.wait_placement`. Placements of one version are not told apart.

        Args:
            placement: its hosts host the experts already; its version is not below that of the present one.
            timeout: seconds to find and join ranks; default: config.connect_timeout_s.

        Raises:
            SetupError: one of them did not appear in time, or refused; the placement stays as it was.
            ValueError: another number of experts, an older version, or a comm on a device.
        """
        require_next_placement(placement, self)
        deadline = Deadline(self.config.connect_timeout_s if timeout is None else require_seconds("timeout", timeout))
        peers = {peer.rank: peer for peer in self.peers()}  # of several lives the last
        ended = {peer.life for peer in self.peers() if peer.state == "left"}  # a lost link may be made again
        for expert_rank in placement.members:
            known = peers.get(expert_rank)
            if known is not None and known.state == "live":
                continue
            if known is not None:
                self.recover(expert_rank)
            bootstrap.connect(self._native, self._identity, self._store, expert_rank, deadline, ended)
        self._num_ranks = max(self._num_ranks, placement.num_expert_ranks)
        self._placed = (placement._native(), self._num_ranks, placement.version)  # what routes go by
        self._native.set_hosts(placement.hosts)
        self.placement = placement

    def idle(self) -> None:
        """Nothing to send for now: tells it to every peer, so that no expert rank lingers for this one, and which
        placement it has.

        It sends on every free microbatch: not while other threads drive some of them.
        """
        self._native.idle(self._path.timeout_s, self._version_to_show(), *self._path.launch(None))
