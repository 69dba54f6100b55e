# SPDX-License-Identifier: Apache-2.0
"""What attention and expert ranks share: opening, closing, and the view of their peers."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from . import _C, arrays
from .checks import require_int, require_positive_seconds
from .deadline import Deadline
from .handshake import NETWORKS, Identity
from .listener import Listener
from .notes import say
from .paths import path_of
from .shape import Config, Placement, Shape
from .store import Store, describe_store, open_store

_open_ranks: set[tuple[str, str, str, int]] = set()
_open_ranks_lock = threading.Lock()


def _forget_open_ranks() -> None:
    """A child owns none of its parent's comms, and may open ranks of the same names."""
    _open_ranks.clear()
    _open_ranks_lock.release()


os.register_at_fork(
    before=_open_ranks_lock.acquire, after_in_parent=_open_ranks_lock.release, after_in_child=_forget_open_ranks
)


def require_placement(placement: Any, shape: Shape) -> None:
    """Refuses what is no placement of this shape's experts."""
    if not isinstance(placement, Placement):
        raise TypeError(f"placement: expected m2n.Placement, got {type(placement).__name__}")
    if placement.num_experts != shape.num_experts:
        raise ValueError(f"placement: places {placement.num_experts} experts, the shape has {shape.num_experts}")


def require_next_placement(placement: Any, comm: Comm) -> None:
    """Refuses what cannot follow the placement of this comm."""
    require_placement(placement, comm.shape)
    if comm._path.is_launched:
        raise ValueError(f"placement: that of a comm on {comm.device!r} is fixed; make a new comm")
    if placement.version < comm.placement.version:
        raise ValueError(
            f"placement: its version {placement.version} is older than {comm.placement.version}, which {comm!r} has; "
            "give later placements a higher version"
        )


@functools.cache
def _say_insecure(words: str) -> None:
    """Once in a process."""
    say(words)


class PeerStatus(NamedTuple):
    """A life of a peer as this rank sees it: "live", "left" (it said goodbye) or "lost" (`cause` says why). A rank
    that was restarted has several, of which the last is the newest."""

    rank: int
    state: str
    life: int
    cause: str


def _shut_down(
    native: _C.Comm,
    listener: Listener | None,
    key: tuple[str, str, str, int],
) -> None:
    native.close()
    if listener is not None:
        listener.close()
    with _open_ranks_lock:
        _open_ranks.discard(key)


class Comm:
    """What both roles share. Use it as a context manager, or call close()."""

    role: str
    _native: Any

    def __init__(
        self, rank: int, shape: Shape, placement: Placement, name: str, config: Config | None, device: Any
    ) -> None:
        self.rank = require_int("rank", rank, 0)
        if not isinstance(shape, Shape):
            raise TypeError(f"shape: expected m2n.Shape, got {type(shape).__name__}")
        require_placement(placement, shape)
        self.device = arrays.device_name(device)
        self.shape = shape
        self._native_shape = shape._native()
        self.placement = placement
        self.config = config if config is not None else Config()
        self._counters: dict[str, float] = {"rows_gathered": 0}
        if arrays.is_capturing(self.device):
            raise _C.SetupError("a comm cannot be made while a CUDA graph is captured: make it before")
        self._path = path_of(self.device, self.config)
        transport, self._transport = self._path.transport()
        if self.config.insecure and transport in ("auto", *NETWORKS):
            _say_insecure(self.config._insecure_words())
        wire = (self.config.heartbeat_s, self.config.job_key, self.config.insecure)
        self._identity = Identity(self.config.job, name, self.role, self.rank, shape, transport, *wire)

    @contextmanager
    def _opened(self, native: Any) -> Iterator[tuple[str, str, str, int]]:
        """Registers the rank in this process; on an error in the block everything is undone."""
        key = (self.config.job, self._identity.name, self.role, self.rank)
        with _open_ranks_lock:
            if key in _open_ranks:
                raise _C.SetupError(
                    f"{self._identity} is open in this process already (job {key[0]!r}, name {key[1]!r}); "
                    "close it first, or give this one another name"
                )
            _open_ranks.add(key)
        self._native = native
        if self.config.give_up_s is not None:
            native.set_give_up(self.config.give_up_s)
        # Runs on an error, and at the end of a program that ends meanwhile.
        undo = weakref.finalize(self, _shut_down, native, None, key)
        try:
            self._path.set_timeout(native, self._path.timeout_s)
            yield key
        except BaseException:
            undo()
            raise
        undo.detach()

    def close(self) -> None:
        """Says goodbye to every peer, after any signals that are still held back by `Config.faults`.

        Calls that wait elsewhere on this comm end with SetupError. On a device, what was launched goes on to its end
        first, its deadline at the latest; for graphs that are being replayed only the caller can wait.
        """
        self._finalizer()

    def abort(self) -> None:
        """Ends every wait of this comm at once, of verbs that were launched too (their missing rows are NaN), and
        closes it. Other comms of the process go on."""
        self._native.abort()
        self._finalizer()

    def set_timeout(self, timeout: float) -> None:
        """Another deadline, in seconds, for verbs that are given none; on a device also for those of captured graphs,
        from their next replay on."""
        self._path.set_timeout(self._native, require_positive_seconds("timeout", timeout))

    def _open_store(self, store: Any, deadline: Deadline) -> Store:
        opened = open_store(store, deadline, self.config.store_timeout_s, str(self._identity))
        self._identity = dataclasses.replace(self._identity, store=describe_store(store))
        return opened

    def _keep_open(self, native: Any, listener: Listener | None, key: tuple[str, str, str, int]) -> None:
        # Runs at close(), when the comm is collected, or at the end of the program, whichever comes first.
        self._finalizer = weakref.finalize(self, _shut_down, native, listener, key)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<m2n {self._identity} of {self.config.job!r}/{self._identity.name!r}>"

    def check(self) -> None:
        """Raises PeerLost for the first lost peer that recover() was not called for."""
        self._native.check()

    def peers(self) -> list[PeerStatus]:
        """All peers this rank was ever linked with, in the order of joining."""
        return [PeerStatus(*peer) for peer in self._native.peers()]

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """Where the clocks of live peers on other hosts stand, from their heartbeats, by rank.

        Returns:
            (by how many seconds the peer's time.monotonic() is ahead of this host's, the round trip in seconds): it is
            known to half of that.
        """
        return {rank: (ahead / 1e9, round_trip / 1e9) for rank, ahead, round_trip in self._native.clock_offsets()}

    def stats(self) -> dict[str, float]:
        """Counters since the comm was made: messages, rows and bytes in each direction, wait_us, rows_gathered,
        and bytes_packed: of rows that were copied once more before they were sent, for `route(pack=True)`.

        With `Config.stream_waits` there are stream_waits, before how many verbs a stream has waited by itself, and
        stream_waits_ended. The latter counts the waits that the host had to end, as the peer was late or gone.
        With `Config.faults` there are signals_held, those that were held back and have come by now, and held_us, for
        how long in all. wait_us leaves out waits of a few microseconds. What does not apply is 0.
        """
        return {**self._native.stats(), **self._counters}

    def recover(self, peer: int) -> None:
        """Goes on without a peer that is lost or has left: from now on it is known to be gone, and its slots are free.

        All lives of the rank that have ended are given up; where one is alive it stays as it is, as a new life may have
        joined meanwhile, and calling it again changes nothing. On an attention rank a batch in flight for which it owes
        rows stays in flight: `AttentionComm.combine_recv` goes on to raise PeerLost, or takes the others. On an expert
        rank messages of it that were not received yet are no longer served.

        Raises:
            ValueError: a rank that was never linked with this one.
        """
        self._native.recover(require_int("peer", peer, 0))

    def drop(self, peer: int, reason: str = "") -> None:
        """Gives up a peer that is alive: it hangs, or is stopped, or is not wanted any more.

        The link is lost from this side, as after a loss and `recover`. The peer learns it, with the reason, once it
        runs: its link to this rank is lost, and its errors and `peers()` say why. A peer that is gone is given up.

        Args:
            peer: its rank.
            reason: at most 512 bytes of it are told.

        Raises:
            ValueError: a rank that was never linked with this one.
        """
        self._native.drop(require_int("peer", peer, 0), reason)
