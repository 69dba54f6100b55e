# SPDX-License-Identifier: Apache-2.0
"""What an error tells the user to do is done here, and helps. An advice in the sources that is not listed fails."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import pytest
from advice import ELSEWHERE, all_advice
from bodies import ONE, SMALL
from small_case import IDS, TWO, WEIGHTS
from waits import until

import m2n
from m2n.testing import expert_outputs

X = np.ones((3, SMALL.hidden), np.float32)
ALSO_1 = m2n.Placement([[0], [0], [0], [1]])


class Ranks:
    """The expert ranks and the one attention rank of a test, made with the options of each."""

    def __init__(self, store: Path, placement: m2n.Placement = ONE, device: str = "cpu", **changes: Any) -> None:
        self.stack = contextlib.ExitStack()
        self.store, self.config = store, dataclasses.replace(bodies.NUMPY, **{"timeout_s": 10.0, **changes})
        self.placement, self.device = placement, device
        self.experts = [self.expert(rank, device=device) for rank in range(placement.num_expert_ranks)]
        self.comm = self.attention(device=device)
        until(lambda: all(len(server.peers()) == 1 for server in self.experts))

    def expert(self, rank: int = 0, placement: m2n.Placement | None = None, **options: Any) -> m2n.ExpertComm:
        common = (SMALL, placement or self.placement, self.store)
        return self.stack.enter_context(m2n.ExpertComm(rank, *common, config=self.config, **options))

    def attention(self, rank: int = 0, **options: Any) -> m2n.AttentionComm:
        options = {"config": self.config, **options}
        return self.stack.enter_context(m2n.AttentionComm(rank, SMALL, self.placement, self.store, **options))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()

    def dispatch(self, num_tokens: int = 3, **options: Any) -> None:
        route = self.comm.route(IDS[:num_tokens], WEIGHTS[:num_tokens])
        self.comm.dispatch_send(X[:num_tokens], route, **options)

    def answer(self, *servers: m2n.ExpertComm) -> None:
        for server in servers or self.experts:
            batch = server.dispatch_recv()
            assert batch is not None
            server.combine_send(batch, expert_outputs(batch, batch.experts))

    def works(self, *servers: m2n.ExpertComm, num_tokens: int = 3) -> None:
        """A whole exchange."""
        self.dispatch(num_tokens)
        self.answer(*servers)
        assert np.isfinite(self.comm.combine_recv()).all()


def told(error: type[BaseException], words: str) -> Any:
    return pytest.raises(error, match=re.escape(words))


def larger_max_peers(store: Path) -> None:
    with m2n.ExpertComm(0, SMALL, ONE, store, max_peers=1, config=bodies.NUMPY):
        with m2n.AttentionComm(0, SMALL, ONE, store, config=bodies.NUMPY):
            with told(m2n.SetupError, "make it with a larger max_peers"):
                m2n.AttentionComm(1, SMALL, ONE, store, config=bodies.NUMPY)
    with m2n.ExpertComm(0, SMALL, ONE, store, max_peers=2, config=bodies.NUMPY), contextlib.ExitStack() as stack:
        for rank in range(2):
            stack.enter_context(m2n.AttentionComm(rank, SMALL, ONE, store, config=bodies.NUMPY))


def smaller_windows(store: Path) -> None:
    large = m2n.Shape(1, 4, 1, 2**20, dispatch_dtype="float32", combine_dtype="float32")
    with told(ValueError, "lower max_peers, max_tokens or microbatches"):
        m2n.ExpertComm(0, large, ONE, store, max_peers=1024, config=bodies.NUMPY)
    m2n.ExpertComm(0, large, ONE, store, max_peers=8, config=bodies.NUMPY).close()
    m2n.ExpertComm(0, dataclasses.replace(large, max_tokens=8), ONE, store, max_peers=1024, config=bodies.NUMPY).close()


def chunks(store: Path) -> None:
    with told(ValueError, "; send larger ones in chunks"):
        m2n.ExpertComm(0, dataclasses.replace(SMALL, max_tokens=2**23), ONE, store, config=bodies.NUMPY)
    with Ranks(store) as ranks:
        many = np.tile(IDS, (4, 1))
        with told(ValueError, "; send them in several dispatches"):
            ranks.comm.route(many, np.full(many.shape, 0.5, np.float32))
        for _ in range(4):
            ranks.works()


def recover(store: Path) -> None:
    with Ranks(store, TWO) as ranks:
        ranks.experts[1]._native.drop_peer(0)
        until(lambda: ranks.comm.peers()[1].state == "lost")
        with told(m2n.PeerLost, "; call recover(1) to go on without it"):
            ranks.comm.check()
        ranks.comm.recover(1)
        ranks.comm.check()
        ranks.works(ranks.experts[0], num_tokens=1)


def nan_for_missing(store: Path) -> None:
    with Ranks(store, TWO) as ranks:
        ranks.dispatch()
        ranks.experts[1].close()
        ranks.answer(ranks.experts[0])
        with told(m2n.PeerLost, " will not come, and missing='nan' takes the others"):
            ranks.comm.combine_recv()
        assert np.isfinite(ranks.comm.combine_recv(missing="nan")[0]).all()


def call_again_or_drop(store: Path) -> None:
    with Ranks(store, TWO, timeout_s=0.05) as ranks:
        first, other = ranks.experts
        ranks.dispatch()
        with told(m2n.Timeout, " in time; call again to go on waiting, or drop(0) to go on without it"):
            ranks.comm.combine_recv()
        ranks.answer()
        ranks.comm.combine_recv()
        for follow in (lambda: ranks.answer(other), lambda: ranks.comm.drop(1)):
            ranks.dispatch(1)
            ranks.answer(first)
            ranks.comm.combine_recv()
            with told(m2n.Timeout, "is it still serving batches? Call again to go on waiting, or drop(1)"):
                ranks.dispatch(1)
            follow()
        ranks.works(first, num_tokens=1)


def next_life_or_other_placement(store: Path) -> None:
    with Ranks(store, TWO) as ranks:
        for _ in range(2):
            ranks.experts[1].close()
            until(lambda: [peer.state for peer in ranks.comm.peers()][-1] == "left")
            with told(m2n.PeerLost, ", and the route needs it: bring its next life, or a placement without it"):
                ranks.dispatch()
            ranks.experts[1] = ranks.expert(1)
            ranks.comm.set_placement(TWO)
            ranks.works()
        ranks.experts[1].close()
        ranks.experts[0].set_placement(ONE)
        ranks.comm.set_placement(ONE)
        ranks.works(ranks.experts[0])


def check_the_placement(store: Path) -> None:
    with Ranks(store) as ranks:
        route = m2n.Route.from_splits([2, 1], IDS, WEIGHTS, shape=SMALL)
        with told(m2n.PeerLost, ", which this rank never connected to; check the placement"):
            ranks.comm.dispatch_send(X, route)
        ranks.works()


def combine_first(store: Path) -> None:
    with Ranks(store) as ranks:
        ranks.dispatch()
        with told(m2n.SlotBusy, "; call combine_recv(microbatch=0) first"):
            ranks.dispatch()
        ranks.answer()
        ranks.comm.combine_recv()
        ranks.works()


def the_same_placement(store: Path) -> None:
    with Ranks(store, TWO) as ranks:
        ranks.experts[0].set_placement(ALSO_1)
        ranks.experts[1].set_placement(ALSO_1)
        ranks.dispatch()
        ranks.answer(ranks.experts[0])
        assert ranks.experts[1].dispatch_recv(timeout=0.05) is None
        with told(m2n.ProtocolError, "; give both sides the same placement"):
            ranks.comm.combine_recv()
        ranks.comm.set_placement(ALSO_1)
        ranks.works()


def off_the_list_or_its_next_life(store: Path) -> None:
    with Ranks(store) as ranks, contextlib.ExitStack() as stack:
        server = ranks.experts[0]

        def receive(listed: list[int]) -> None:
            batch = server.dispatch_recv(linger_us=None, attention_ranks=listed)
            assert batch is not None
            server.combine_send(batch, expert_outputs(batch, batch.experts))
            ranks.comm.combine_recv()

        ranks.attention(1).close()
        until(lambda: [peer.state for peer in server.peers()] == ["live", "left"])
        for listed, is_back in (([0], False), ([0, 1], True)):
            ranks.dispatch()
            with told(m2n.PeerLost, "; take it off attention_ranks, or wait for its next life (wait_peer)"):
                server.dispatch_recv(linger_us=None, attention_ranks=[0, 1])
            if is_back:
                other = stack.enter_context(ranks.attention(1))
                assert server.wait_peer(1)
                other.dispatch_send(X, other.route(IDS, WEIGHTS))
            receive(listed)


def answer_first(store: Path) -> None:
    with Ranks(store, device="emulated") as ranks:
        server = ranks.experts[0]
        ranks.dispatch()
        batch = server.dispatch_recv(0, 0, sync=False)
        with told(m2n.SlotBusy, " is not answered, and its lists are in use; call combine_send first"):
            server.dispatch_recv(0, 0, sync=False)
        with told(ValueError, "layout: 'padded' needs counts on the host; receive with sync=True, or use"):
            batch.gather("padded")
        server.combine_send(batch, np.zeros((batch.num_pairs, SMALL.hidden), np.float32))
        ranks.comm.combine_recv()
        ranks.dispatch()
        again = server.dispatch_recv()
        assert again.gather("padded").shape[0] == 4 and again.gather("expert_major").shape[0] == 6
        server.combine_send(again, expert_outputs(again, again.experts))
        ranks.comm.combine_recv()


def contiguous(store: Path) -> None:
    with Ranks(store) as ranks:
        x, route = np.ones((3, 2 * SMALL.hidden), np.float32)[:, ::2], ranks.comm.route(IDS, WEIGHTS)
        with told(ValueError, "; make it contiguous first"):
            ranks.comm.dispatch_send(x, route)
        ranks.comm.dispatch_send(np.ascontiguousarray(x), route)


def routes(store: Path) -> None:
    with Ranks(store) as ranks, Ranks(store, device="emulated", job="other") as launched:
        route = launched.comm.route(IDS, WEIGHTS)
        with told(ValueError, "; use comm.route"):
            ranks.comm.dispatch_send(X, route)
        old = ranks.comm.route(IDS, WEIGHTS)
        ranks.dispatch()
        in_flight = ranks.comm._borrowed[0][1]
        with told(ValueError, "out: this route is in flight; call combine_recv for its microbatch first"):
            ranks.comm.route(IDS, WEIGHTS, out=in_flight)
        ranks.answer()
        ranks.comm.combine_recv()
        ranks.comm.route(IDS, WEIGHTS, out=in_flight)
        ranks.comm.set_placement(m2n.Placement.block(4, 1, version=1))
        with told(ValueError, " by now (set_placement); make it again with comm.route"):
            ranks.comm.dispatch_send(X, old)
        with told(ValueError, "; give later placements a higher version"):
            ranks.comm.set_placement(ONE)
        ranks.comm.set_placement(m2n.Placement.block(4, 1, version=2))
        with told(ValueError, "so there is nothing to pack; leave it out"):
            launched.comm.route(IDS, WEIGHTS, pack=True)
        launched.comm.route(IDS, WEIGHTS)
        with told(ValueError, " is fixed; make a new comm"):
            launched.comm.set_placement(ONE)
        launched.comm.close()
        launched.comm = launched.attention(device="emulated")
        launched.works()


def another_name(store: Path) -> None:
    with Ranks(store) as ranks:
        with told(m2n.SetupError, "; close it first, or give this one another name"):
            ranks.attention()
        ranks.expert(name="other")
        ranks.attention(name="other").close()
        ranks.comm.close()
        ranks.comm = ranks.attention()
        ranks.works()


def copy_before(store: Path) -> None:
    with Ranks(store) as ranks:
        for copies in (False, True):
            ranks.dispatch()
            batch = ranks.experts[0].dispatch_recv()
            copy = batch.gather() if copies else None
            ranks.experts[0].combine_send(batch, np.zeros((6, SMALL.hidden), np.float32))
            ranks.comm.combine_recv()
            with told(m2n.Error, "; copy before it what is needed later"):
                _ = batch.x
        assert copy is not None and copy.all()


def lists_and_lingering(store: Path) -> None:
    with Ranks(store) as ranks:
        server, words = ranks.experts[0], "attention_ranks: give it together with linger_us=None"
        ranks.dispatch()
        with told(ValueError, words):
            server.dispatch_recv(linger_us=None)
        with told(ValueError, words):
            server.dispatch_recv(attention_ranks=[0])
        assert server.dispatch_recv(linger_us=None, attention_ranks=[0]) is not None
        with (
            told(ValueError, "dispatch_recv: with sync=False name layer and microbatch"),
            Ranks(store, device="emulated", job="other") as launched,
        ):
            launched.experts[0].dispatch_recv(sync=False)


def settings(store: Path) -> None:
    key = "0123456789abcdef"
    with told(m2n.SetupError, "give all ranks the same Config(job_key=...) or M2N_JOB_KEY, or Config(insecure=True)"):
        m2n.ExpertComm(0, SMALL, ONE, store, config=m2n.Config(bind="127.0.0.1"))
    for changes in ({"job_key": key}, {"insecure": True}):
        m2n.ExpertComm(0, SMALL, ONE, store, config=m2n.Config(bind="127.0.0.1", **changes)).close()
    slow = m2n.Faults(delay_us=1)
    with told(ValueError, "; use device='cpu', or no faults (M2N_FAULTS)"):
        m2n.ExpertComm(0, SMALL, ONE, store, device="emulated", config=m2n.Config(faults=slow))
    m2n.ExpertComm(0, SMALL, ONE, store, config=m2n.Config(faults=slow)).close()
    m2n.ExpertComm(0, SMALL, ONE, store, device="emulated", config=m2n.Config(faults=None)).close()


def torch_ops(store: Path) -> None:
    import torch

    from m2n import torch_ops as ops

    with Ranks(store) as ranks:
        with told(ValueError, "; make it with Config(arrays='torch')"):
            ops.register(ranks.experts[0])
        with told(ValueError, "comm: it is not registered; call m2n.torch_ops.register(comm) before"):
            ops.dispatch_send(ranks.comm, torch.from_numpy(X), torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
        ops.register(ranks.comm)
        ops.dispatch_send(ranks.comm, torch.from_numpy(X), torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
    with Ranks(store, arrays="torch") as ranks:
        ops.register(ranks.experts[0])


TRIED: dict[Callable[[Path], None], tuple[str, ...]] = {
    larger_max_peers: ("; make it with a larger max_peers",),
    smaller_windows: ("; lower max_peers, max_tokens or microbatches",),
    chunks: ("; send larger ones in chunks", "; send them in several dispatches"),
    recover: ("; call recover(",),
    nan_for_missing: (" will not come, and missing='nan' takes the others",),
    call_again_or_drop: (
        " in time; call again to go on waiting, or drop(",
        "is it still serving batches? Call again to go on waiting, or drop(",
    ),
    next_life_or_other_placement: (", and the route needs it: bring its next life, or a placement without it",),
    check_the_placement: (", which this rank never connected to; check the placement",),
    combine_first: ("; call combine_recv(microbatch=",),
    the_same_placement: ("; give both sides the same placement",),
    off_the_list_or_its_next_life: ("; take it off attention_ranks, or wait for its next life (wait_peer)",),
    answer_first: ("lists are in use; call combine_send first", "receive with sync=True, or use 'expert_major'"),
    contiguous: ("; make it contiguous first",),
    routes: (
        "; use comm.route",
        "out: this route is in flight; call combine_recv for its microbatch first",
        " by now (set_placement); make it again with comm.route",
        "; give later placements a higher version",
        "so there is nothing to pack; leave it out",
        " is fixed; make a new comm",
    ),
    another_name: ("; close it first, or give this one another name",),
    copy_before: ("; copy before it what is needed later",),
    lists_and_lingering: ("attention_ranks: give it together with linger_us=None",),
    settings: (
        "give all ranks the same Config(job_key=...) or M2N_JOB_KEY, or Config(insecure=True) where the network is",
        "; use device='cpu', or no faults (M2N_FAULTS)",
    ),
    torch_ops: ("; make it with Config(arrays='torch')", "it is not registered; call m2n.torch_ops.register(comm)"),
}


def test_every_advice_is_tried_or_says_why_not() -> None:
    listed = [*ELSEWHERE, *(words for group in TRIED.values() for words in group)]
    found = list(all_advice())
    new = [text for text in found if not any(words in text for words in listed)]
    assert not new, f"not tried: {new}"
    old = [words for words in listed if not any(words in text for text in found) and "missing='nan'" not in words]
    assert not old, f"nobody says it any more: {old}"


@pytest.mark.parametrize("follow", TRIED, ids=lambda follow: follow.__name__)
def test_what_an_error_advises_helps(follow: Callable[[Path], None], tmp_path: Path) -> None:
    follow(tmp_path)
