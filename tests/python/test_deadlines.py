# SPDX-License-Identifier: Apache-2.0
"""Waits end by the deadline of whoever called, healthy links live on, and those that were cut are made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import NUMPY, ONE, SMALL, small_answer, small_attention, small_dispatch, small_expert
from handshakes import KEY, FakeNative, identity, in_this_host, published
from processes import program
from waits import SOON_S, until

import m2n
from m2n import bootstrap
from m2n.bootstrap import Address
from m2n.channel import Again
from m2n.deadline import Deadline
from m2n.handshake import link_transport
from m2n.interfaces import host_name
from m2n.store import PathStore


def publish(store: Path, address: Address) -> None:
    key = identity("expert").store_key("expert", 0)
    PathStore(store).set(key, json.dumps(dataclasses.asdict(address)))


@contextlib.contextmanager
def stopped_expert(store: Path) -> Iterator[None]:
    """An expert rank of this host that is stopped: the system accepts for it, and nobody answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind("")  # an address that the kernel picks
        listening.listen(8)
        publish(store, Address(1, listening.getsockname()[1:].decode(), host_name(), ""))
        yield


def test_a_stopped_expert_rank_is_named_by_the_deadline_of_the_caller(tmp_path: Path) -> None:
    with stopped_expert(tmp_path):
        began = time.monotonic()
        with pytest.raises(m2n.SetupError, match="could not be joined within .*it accepted but did not answer"):
            small_attention_by(tmp_path, 0.5)
        assert time.monotonic() - began < 3  # 0.5, and a busy machine; it was 10


def small_attention_by(store: Path, seconds: float, **about: Any) -> m2n.AttentionComm:
    config = dataclasses.replace(NUMPY, connect_timeout_s=seconds, **about)
    return m2n.AttentionComm(0, SMALL, ONE, store, config=config)


def test_set_placement_ends_by_its_own_deadline(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        server.close()
        until(lambda: comm.peers()[0].state == "left")
        with stopped_expert(tmp_path):
            began = time.monotonic()
            with pytest.raises(m2n.SetupError, match="could not be joined within 0.* s: .*did not answer"):
                comm.set_placement(ONE, timeout=0.05)
            assert time.monotonic() - began < 2


def test_a_handshake_over_a_network_that_hangs_does_not_end_the_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "HANDSHAKE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(bootstrap, "_UNREACHABLE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        port = hung.getsockname()[1]
        publish(tmp_path, Address(1, "m2n-0", "there", f"127.0.0.1:{port}"))
        comms: list[m2n.AttentionComm] = []
        thread = threading.Thread(target=lambda: comms.append(small_attention_by(tmp_path, 20, job_key=KEY)))
        thread.start()
        with hung.accept()[0]:
            hung.accept()[0].close()  # it has tried again
            with small_expert(tmp_path):
                thread.join(20)
                assert comms and comms[0].peers()[0].state == "live"
                comms[0].close()


def test_a_deadline_is_never_later_than_the_one_it_is_cut_from() -> None:
    outer = Deadline(0.2)
    assert outer.cut(5.0).remaining() <= 0.2 and outer.cut(0.05).seconds == 0.05 and not outer.has_expired
    outer.sleep(60)
    assert outer.has_expired and outer.remaining() == 0 and outer.cut(1.0).has_expired and outer.passed >= 0.2


# ---- heartbeats


WITHOUT_PIDFD = """
import dataclasses, sys, time, bodies, m2n
from m2n import channel
if sys.argv[2] == "denied":
    channel.open_pidfd = lambda pid: -1
config = dataclasses.replace(bodies.NUMPY, heartbeat_s=0.05)
comm = m2n.AttentionComm(0, bodies.SMALL, bodies.ONE, sys.argv[1], config=config)
for number in range(12):
    expected = bodies.small_dispatch(comm)
    assert (comm.combine_recv() == expected).all()
    time.sleep(0.05)
comm.close()
"""


@pytest.mark.parametrize("why", ["denied", "in another pid namespace"])
def test_a_link_lives_on_where_one_side_alone_is_told_of_the_others_death(why: str, tmp_path: Path) -> None:
    command = program(WITHOUT_PIDFD, tmp_path, why)
    if why != "denied":
        apart = [shutil.which("unshare") or "", "--pid", "--fork", "--kill-child"]
        if not apart[0] or subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
            pytest.skip("needs unshare --pid")
        command = [*apart, *command]
    config = dataclasses.replace(NUMPY, heartbeat_s=0.05)
    with m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config) as server:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            small_answer(server, timeout=0.1)
        assert process.stderr is not None
        assert process.wait() == 0, process.stderr.read()
        assert [peer.state for peer in server.peers()] == ["left"]


def test_both_sides_send_heartbeats_where_either_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeNative, "offer", _offer_of_one_host)
    for needs in (False, True):
        with in_this_host("shm") as (_, native, address):
            if needs:
                monkeypatch.setattr(bootstrap.UnixChannel, "needs_heartbeats", property(_is_the_attention_sides))
            ours = FakeNative()
            bootstrap._greet(ours, identity("attention", transport="shm"), address, 0, Deadline(SOON_S))
            assert native.is_watched.wait(SOON_S)
            assert ours.watched == native.watched == [(-1, 1.0, 3.0) if needs else (-1, 0.0, 0.0)]


def _is_the_attention_sides(channel: Any) -> bool:
    return threading.current_thread().name != "m2n-handshake"


def _offer_of_one_host(native: FakeNative, rank: int, life: int, is_over_network: bool, link: int) -> dict[str, Any]:
    objects = [(-1, 1), (-1, 2), (-1, 3)]
    return {"link": link, "peer_idx": 0, "process": 5, "device": "", "wakes": True, "objects": objects, "address": b""}


# ---- lives and links


def test_a_link_that_was_cut_between_two_healthy_ranks_is_made_again(tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        for number in range(3):
            expected = small_dispatch(comm)
            assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)
            life = comm.peers()[-1].life
            comm._native.drop_peer(0)
            until(lambda: server.peers()[-1].state == "lost")
            server.recover(0)
            comm.set_placement(ONE)
            assert server.wait_peer(0, SOON_S) and comm.peers()[-1].state == "live"
            assert comm.peers()[-1].life == life
            assert [peer.state for peer in comm.peers()].count("lost") == number + 1


def test_each_link_that_is_begun_has_a_number_of_its_own() -> None:
    who = identity("attention")
    assert [who.next_link(0, 7), who.next_link(0, 7), who.next_link(1, 9), who.next_link(0, 8)] == [1, 2, 1, 1]


def test_a_displaced_rank_is_told_by_whom_and_through_which_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeNative, "offer", _offer_of_one_host)
    with in_this_host("shm") as (_, native, address):
        for number, store in enumerate(("/one/store", "/another/store\x1b[31m")):
            who = identity("attention", transport="shm", store=store)
            bootstrap._greet(FakeNative(), who, address, 0, Deadline(SOON_S))
            until(lambda number=number: len(native.displaces) == number + 1)
    here = f"process {os.getpid()} on {socket.gethostname()[:64]}"
    assert native.displaces[1] == (
        f"a newer process has taken the place of attention rank 0: {here}, store /another/store?[31m; the older one: "
        f"{here}, store /one/store"
    )


def test_another_life_at_the_address_is_looked_up_again(tmp_path: Path) -> None:
    with small_expert(tmp_path):
        right = published(tmp_path)
        publish(tmp_path, dataclasses.replace(right, life=right.life + 1))
        threading.Timer(0.2, publish, (tmp_path, right)).start()
        with small_attention(tmp_path) as comm:
            assert comm.peers()[0].life == right.life


def test_a_link_over_tcp_needs_no_common_memory() -> None:
    class Far:
        is_local = False

    far: Any = Far()
    assert link_transport(identity("expert"), far) == "tcp"
    assert link_transport(identity("expert", transport="ucx"), far) == "ucx"
    with pytest.raises(m2n.SetupError, match="transport 'shm', which reaches only its own"):
        link_transport(identity("expert", transport="shm"), far)


@pytest.mark.parametrize("number", [2**31, 2**32, 2**64, -1])
def test_numbers_that_native_code_does_not_hold_are_refused_by_name(number: int, tmp_path: Path) -> None:
    limit = "expected at (most|least)"
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        route = comm.route(np.zeros((1, 2), np.int32) + [0, 1], np.ones((1, 2)))
        x = np.zeros((1, 64), np.float32)
        for argument, call in {
            "rank": lambda: m2n.AttentionComm(number, SMALL, ONE, tmp_path),
            "max_peers": lambda: small_expert(tmp_path, name="other", max_peers=number),
            "placement": lambda: m2n.Placement([[number]]),
            "num_expert_ranks": lambda: m2n.Placement([[0]], number),
            "peer": lambda: comm.recover(number),
            "attention_ranks": lambda: server.dispatch_recv(linger_us=None, attention_ranks=[number]),
            "microbatch": lambda: server.dispatch_recv(microbatch=number, timeout=0),
            "num_sms": lambda: m2n.Config(num_sms=number),
        }.items():
            with pytest.raises(ValueError, match=f"{argument}: {limit}"):
                call()
        for call in (comm.ready, comm.combine_recv, lambda n: comm.wait_ready([n])):
            with pytest.raises(ValueError, match="microbatch: expected"):
                call(number)
        with pytest.raises(ValueError, match="microbatch: expected"):
            comm.dispatch_send(x, route, microbatch=number)
        if number != 2**31:  # which a layer may be
            with pytest.raises(ValueError, match=f"layer: {limit}"):
                comm.dispatch_send(x, route, layer=number)
        with pytest.raises(ValueError, match=f"rank: {limit}"):
            server.wait_peer(number)
        message = {**bogus_introduction(), "rank": number}
        with pytest.raises(m2n.SetupError, match="sent a number that is none"):
            bootstrap.check_introduction(identity("expert"), message, 0, "shm")


def bogus_introduction() -> dict[str, Any]:
    offer = _offer_of_one_host(FakeNative(), 0, 1, False, 1)
    return bootstrap.introduction(identity("attention"), offer, "shm")


def test_an_expert_rank_that_closes_while_another_joins_has_left(tmp_path: Path) -> None:
    for _ in range(20):
        with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
            server.close()
            until(lambda comm=comm: comm.peers()[0].state != "live")
            assert comm.peers()[0].state == "left"


def test_a_right_introduction_passes() -> None:
    bootstrap.check_introduction(identity("expert"), bogus_introduction(), 0, "shm")
    assert issubclass(Again, m2n.SetupError)
