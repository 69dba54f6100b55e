# SPDX-License-Identifier: Apache-2.0
"""Control connections between hosts: keys, nonces, versions, limits, and addresses that are wrong. Over loopback, with
ranks whose memory stays where it is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bodies import SMALL
from handshakes import KEY, FakeNative, between, frame, greet, identity, listener, read_frame
from waits import SOON_S

import m2n
from m2n import bootstrap, interfaces
from m2n import listener as listener_module
from m2n.bootstrap import Address
from m2n.channel import PROTOCOL_VERSION, Refused, TcpChannel, join_address, split_address
from m2n.deadline import Deadline
from m2n.listener import Listener
from m2n.store import PathStore


@pytest.fixture(autouse=True)
def is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else is on another host."""
    monkeypatch.setattr(bootstrap, "host_name", lambda: "here")


@pytest.mark.parametrize(
    "security", [{"job_key": KEY}, {"insecure": True}, {"job_key": KEY, "insecure": True}], ids=str
)
def test_ranks_of_two_hosts_meet(security: dict[str, Any]) -> None:
    with listener(heartbeat_s=2.0, **security) as (_, native, address):
        ours = greet(address, heartbeat_s=0.5, **security)
        assert native.is_watched.wait(SOON_S)
        # Each sends in its own period, and waits three of the other's.
        assert ours.watched == [(-1, 0.5, 6.0)] and native.watched == [(-1, 2.0, 1.5)]
        assert native.offered[0][0] == 0


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({"job_key": KEY}, {"job_key": KEY + "!"}, "does not sign with this job's key.*job_key.*M2N_JOB_KEY"),
        ({"job_key": KEY}, {"insecure": True}, "it has a job key and this process is insecure"),
        ({"insecure": True}, {"job_key": KEY}, "this process has a job key and it is insecure"),
        ({"job_key": KEY}, {}, "expert rank 0 runs on another host.*job_key.*or Config.insecure=True"),
    ],
    ids=["another key", "only theirs", "only ours", "none of ours"],
)
def test_who_does_not_have_the_key_is_refused_and_nothing_is_offered(
    theirs: dict[str, Any], ours: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with listener(**theirs) as (_, native, address):
        with pytest.raises(Refused, match=words):
            greet(address, **ours)
        assert native.offered == native.watched == []
        greet(address, **theirs)  # it keeps nobody else out


def test_nobody_listens_on_a_network_without_a_key_unless_told_to() -> None:
    with pytest.raises(
        m2n.SetupError, match="bind: at '127.0.0.1' anybody could join expert rank 0.*job_key.*insecure"
    ):
        Listener(FakeNative(), identity("expert"), "127.0.0.1")


def test_a_rank_that_listens_nowhere_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with listener(bind="", job_key=KEY) as (_, _, address):
        assert address.network_address == ""
        with pytest.raises(m2n.SetupError, match="expert rank 0 runs on another host.*no network address.*M2N_BIND"):
            greet(address, job_key=KEY)


# ---- what goes over the wire


@pytest.mark.parametrize("number", [2, 3, 4, 5], ids=["introduction", "token", "reply", "joined"])
def test_what_is_changed_on_the_way_is_refused(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    def change(at: int, data: bytes) -> bytes:
        return data[:-1] + b" }" if at == number else data  # the same to who reads it

    with listener(job_key=KEY) as (_, native, address), between(address, change) as (middle, seen):
        if number == 5:
            greet(middle, job_key=KEY)  # it cannot know yet
        else:
            with pytest.raises(Refused, match="does not sign with this job's key|refused by expert rank 0"):
                greet(middle, job_key=KEY)
    assert native.watched == [] and (not native.offered) == (number < 4)
    assert len(native.withdrawn) == len(native.offered)
    assert KEY.encode() not in b"".join(seen)


def test_what_was_said_before_cannot_be_said_again(capfd: pytest.CaptureFixture[str]) -> None:
    with listener(job_key=KEY) as (_, native, address):
        with between(address, lambda at, data: data) as (middle, seen):
            greet(middle, job_key=KEY)
        assert native.is_watched.wait(SOON_S) and len(native.offered) == 1
        where = split_address(address.network_address)
        with socket.create_connection(where) as again:
            again.sendall(frame(seen[0]))  # the same nonce: the listener's is another one
            read_frame(again)
            again.sendall(frame(seen[2]))
            read_frame(again)
        with socket.create_connection(where) as again:
            again.sendall(seen[-1])  # the hello of a data connection, whose token has been used
            assert again.recv(1) == b""
        said, deadline = "", Deadline(SOON_S)
        for words in ("does not sign with this job's key", "belongs to no handshake that is under way"):
            while words not in said:  # a moment after the connection's end
                assert not deadline.has_expired, said
                said += capfd.readouterr().err
        assert len(native.offered) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m2n": 1}, f"speaks version 1 of the protocol, this process {PROTOCOL_VERSION}"),
        ({"nonce": "00"}, "does not speak m2n: not a hello"),
        ({"nonce": None}, "does not speak m2n"),
        ({"is_keyed": 1}, "does not speak m2n"),
    ],
    ids=str,
)
def test_a_hello_that_is_none_is_told(change: dict[str, Any], words: str) -> None:
    ours, theirs = socket.socketpair()
    hello = {"m2n": PROTOCOL_VERSION, "nonce": "00" * 32, "is_keyed": True, **change}
    theirs.sendall(frame(json.dumps(hello).encode()))
    with ours, theirs, pytest.raises(m2n.SetupError, match=words):
        TcpChannel(_with_a_name(ours), KEY, is_listener=True, deadline=Deadline(SOON_S))


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", frame(b"[" * 60000), frame(b"\xff"), b""], ids=repr)
def test_what_is_no_hello_is_told(text: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(text)
    theirs.shutdown(socket.SHUT_WR)
    with ours, theirs, pytest.raises(m2n.SetupError, match="does not speak m2n|closed the connection"):
        TcpChannel(_with_a_name(ours), KEY, is_listener=True, deadline=Deadline(SOON_S))


def _with_a_name(connection: socket.socket) -> Any:
    class Named:
        """A socket pair's end that says it is a TCP connection."""

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.1", 4711

        def setsockopt(self, *about: Any) -> None:
            pass

    return Named()


def test_a_peer_that_says_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.2)
    with listener(job_key=KEY) as (_, native, address):
        with socket.create_connection(split_address(address.network_address)) as mute:
            mute.settimeout(SOON_S)
            assert mute.recv(1) == b""  # it has hung up, and said nothing
        greet(address, job_key=KEY)


# ---- addresses that are wrong


@pytest.mark.parametrize(
    ("bind", "error", "words"),
    [
        ("nosuchif0", m2n.SetupError, "bind: there is no network interface 'nosuchif0'.*this host has lo"),
        ("203.0.113.77:0", m2n.SetupError, "bind: 203.0.113.77:0 is no address of this host"),
        ("203.0.113.0/24", m2n.SetupError, "bind: no address of this host is in the network 203.0.113.0/24"),
        ("203.0.113.1/24", ValueError, "bind: 203.0.113.1/24 has host bits set"),
        ("0.0.0.0", ValueError, "bind: 0.0.0.0 stands for all interfaces"),
        ("127.0.0.1:port", ValueError, "bind: expected an address, an interface or a network"),
    ],
)
def test_a_bind_that_is_wrong_is_named_at_once(bind: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    placement = m2n.Placement.block(SMALL.num_experts, 1)
    before = threading.active_count()
    with pytest.raises(error, match=words):
        m2n.ExpertComm(0, SMALL, placement, tmp_path, config=m2n.Config(bind=bind, job_key=KEY))
    assert threading.active_count() <= before  # those of tests before may end meanwhile


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = join_address(*taken.getsockname()[:2])
        with pytest.raises(m2n.SetupError, match=f"bind: {address} cannot be used: .*in use"):
            Listener(FakeNative(), identity("expert", job_key=KEY), address)


def test_binds_by_interface_and_network() -> None:
    assert interfaces.resolve_bind("lo:4711") == ("127.0.0.1", 4711)
    assert interfaces.resolve_bind("127.0.0.0/8") == ("127.0.0.1", 0)
    assert interfaces.resolve_bind("[::1]:80") == ("::1", 80) and split_address(join_address("::1", 80)) == ("::1", 80)


def publish(store: Path, network_address: str) -> None:
    key = identity("expert").store_key("expert", 0)
    PathStore(store).set(key, json.dumps(dataclasses.asdict(Address(1, "none", "there", network_address))))


def test_an_address_that_cannot_be_reached_is_named_within_5_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(address: tuple[str, int], timeout: float) -> socket.socket:
        time.sleep(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(bootstrap.socket, "create_connection", create)  # type: ignore[attr-defined]
    publish(tmp_path, "203.0.113.1:4711")
    config = m2n.Config(job_key=KEY, connect_timeout_s=60)
    began = time.monotonic()
    with pytest.raises(
        m2n.SetupError, match="expert rank 0 listens at 203.0.113.1:4711, which cannot be reached.*bind"
    ):
        m2n.AttentionComm(0, SMALL, m2n.Placement.block(SMALL.num_experts, 1), tmp_path, config=config)
    assert time.monotonic() - began < 7  # 5, and a busy machine


def test_a_port_where_nobody_listens_is_looked_up_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        publish(tmp_path, join_address(*free.getsockname()[:2]))
    config = m2n.Config(job_key=KEY, connect_timeout_s=1)
    with pytest.raises(m2n.SetupError, match=r"its address 127.0.0.1:\d+ is stale \(.*refused"):
        m2n.AttentionComm(0, SMALL, m2n.Placement.block(SMALL.num_experts, 1), tmp_path, config=config)


def test_settings_of_the_wire_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_BIND", "lo")
    monkeypatch.setenv("M2N_JOB_KEY", KEY)
    config = m2n.Config()
    assert (config.bind, config.job_key, config.insecure) == ("lo", KEY, False)
    assert KEY not in repr(config)
    monkeypatch.setenv("M2N_INSECURE", "1")
    config = m2n.Config()
    assert (config.job_key, config.insecure) == (KEY, True)  # the key is still asked for
    assert "must show the job key to join" in m2n.features()["insecure_words"]
    for wrong in ({"job_key": "short"}, {"heartbeat_s": 0}, {"store_timeout_s": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            m2n.Config(**{"insecure": False, **wrong})
    for field in ("insecure", "stream_waits", "gpu_direct"):
        with pytest.raises(TypeError, match=f"{field}: expected True or False, got 'no'"):
            m2n.Config(**{field: "no"})


@pytest.mark.ucx
def test_diagnose_measures_every_transport_of_this_host() -> None:
    command = [sys.executable, "-m", "m2n", "diagnose"]
    environment = {name: value for name, value in os.environ.items() if name not in ("M2N_BIND", "M2N_JOB_KEY")}
    environment["M2N_INSECURE"] = "1"  # else UCX has no TCP
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for transport in ("shm", "tcp", "ucx"):
        assert re.search(
            rf"^{transport}  yes: [\d.]+ us one way for 1 KB, [\d.]+ GB/s each way", done.stdout, re.MULTILINE
        )
    assert "M2N_BIND is not set: expert ranks listen on this host only; it has lo (127.0.0.1" in done.stdout
    one_side = subprocess.run([*command, "--role", "expert"], capture_output=True, text=True, timeout=100)
    assert one_side.returncode == 2 and "give --role and --store together" in one_side.stderr
