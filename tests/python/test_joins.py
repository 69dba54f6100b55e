# SPDX-License-Identifier: Apache-2.0
"""Joins that go wrong on either side, crowds at the door, and deadlines: nobody is kept out, nothing is used up, and
each error says whose it is."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import resource
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bodies import SMALL, small_answer, small_attention, small_dispatch, small_expert
from handshakes import KEY, NEAR_SPEAKS, FakeNative, between, greet, identity, in_this_host, listener, published
from processes import program
from waits import SOON_S, until

import m2n
from m2n import bootstrap, notes
from m2n import listener as listener_module
from m2n.bootstrap import Address
from m2n.channel import Again, Refused, Shortage, UnixChannel, split_address
from m2n.deadline import Deadline


@pytest.fixture
def is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else is on another host."""
    monkeypatch.setattr(bootstrap, "host_name", lambda: "here")


# ---- data connections


@pytest.mark.usefixtures("is_elsewhere")
@pytest.mark.parametrize("security", [{"job_key": KEY}, {"insecure": True}], ids=["key", "no key"])
def test_both_ends_get_one_data_connection_and_a_forged_one_nothing(
    security: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    forged: list[bytes] = []

    def change(at: int, data: bytes) -> bytes:
        if at != len(NEAR_SPEAKS):
            return data
        for wrong in (bytes(32), hmac.digest(b"", b"data" + data[4:20], "sha256")):
            with socket.create_connection(split_address(address.network_address)) as stranger:
                stranger.sendall(data[:20] + wrong)  # it has seen the token, and has no secret of the session
                forged.append(stranger.recv(1))
        return data

    with listener(**security) as (_, native, address), between(address, change) as (middle, _):
        ours = greet(middle, **security)
        assert native.is_watched.wait(SOON_S) and forged == [b"", b""]
    with listener(**security) as (_, native, address):
        ours = greet(address, **security)
        assert native.is_watched.wait(SOON_S)
        with ours.data, native.data:
            assert ours.data.getpeername() == native.data.getsockname()
            ours.data.sendall(b"x")
            assert native.data.recv(2) == b"x"
            for end in (ours.data, native.data):
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and end.gettimeout() is None


def test_within_a_host_the_expert_rank_makes_both_ends_of_a_data_connection() -> None:
    with in_this_host("tcp") as (_, native, address):
        ours = FakeNative()
        bootstrap._greet(ours, identity("attention", transport="tcp"), address, 0, Deadline(SOON_S))
        assert native.is_watched.wait(SOON_S)
        with ours.data, native.data:
            native.data.sendall(b"x")
            assert ours.data.recv(2) == b"x" and ours.data.getpeername() == native.data.getsockname()


# ---- crowds


def crowd(stack: contextlib.ExitStack, address: Address, count: int) -> list[socket.socket]:
    """Connections to the network address that say nothing."""
    where = split_address(address.network_address)
    return [stack.enter_context(socket.create_connection(where)) for _ in range(count)]


@pytest.mark.usefixtures("is_elsewhere")
def test_a_crowd_that_says_nothing_keeps_nobody_out(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        listening, native, address = stack.enter_context(listener(job_key=KEY))
        crowd(stack, address, 100)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as local:  # a room of its own
            local.settimeout(SOON_S)
            local.connect("\0" + listening.address)
            local.send(b"{}")
            assert b"handshake: None rank None speaks version None" in local.recv(65536)
        for number in range(3):
            greet(address, job_key=KEY)
            assert len(native.offered) == number + 1
        began = time.monotonic()
        listening.close()
        assert time.monotonic() - began < 1.5  # what is in a handshake ends with it: it took 10 s
    said = capfd.readouterr().err
    assert said.count("others waited while it said nothing right") == 1


def test_a_whole_handshake_has_one_deadline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.3)
    with listener(job_key=KEY) as (_, _, address):
        with socket.create_connection(split_address(address.network_address)) as slow:
            slow.settimeout(0.05)
            began, sent = time.monotonic(), 0
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < SOON_S:
                    slow.sendall(b"\0\0\1\0"[sent : sent + 1] or b" ")
                    sent += 1
                    with contextlib.suppress(TimeoutError):
                        if slow.recv(1) == b"":
                            break
            assert 0.2 < time.monotonic() - began < 3
        said = ""
        while "did not answer in time" not in said:
            assert time.monotonic() - began < SOON_S, said
            said += capfd.readouterr().err


def bogus(address: str, to_life: int, **changes: Any) -> dict[str, Any]:
    """A right introduction with descriptors that are none of a window; what the expert rank says to it."""
    offer = {"process": 1, "device": "", "wakes": True, "objects": [(0, 1), (0, 2), (0, 3)], "address": b"", "link": 1}
    who = bootstrap.Identity("default", "default", "attention", 0, SMALL)
    message = {**bootstrap.introduction(who, offer, "shm"), "to_life": to_life, **changes}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(SOON_S)
        connection.connect("\0" + address)
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 0, 0])
        answer: dict[str, Any] = json.loads(connection.recv(65536))
        return answer


def test_introductions_that_fail_use_nothing_up_and_are_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_expert(tmp_path, max_peers=2) as server:
        address = published(tmp_path)
        for number in range(40):
            said = bogus(address.address, address.life, life=1000 + number, host="\x1b[31m", pid=number)
            assert "not a sealed memfd" in said["error"] and not said["again"]
        with small_attention(tmp_path) as first, small_attention(tmp_path, rank=1) as second:
            assert first.peers()[0].state == second.peers()[0].state == "live"
            assert server.wait_peer(0) and server.wait_peer(1)
        assert {peer.rank for peer in server.peers()} == {0, 1}
    said_here = capfd.readouterr().err.splitlines()
    assert len([line for line in said_here if "a peer could not join" in line]) == 1


def test_what_comes_again_and_again_is_said_once_then_counted(capfd: pytest.CaptureFixture[str]) -> None:
    heard = notes.Notes(quiet_s=0.2)
    for number in range(100):
        heard.say(f"192.0.2.1:{number} sent {number}\x1b[2J\nnonsense", "192.0.2.1")
    heard.say("another thing", "192.0.2.1")
    heard.say("another thing", "192.0.2.2")
    time.sleep(0.25)
    heard.say("192.0.2.1:5 sent 5\x1b[2J\nnonsense", "192.0.2.1")
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "m2n: 192.0.2.1:0 sent 0?[2J?nonsense",
        "m2n: another thing",
        "m2n: another thing",
        "m2n: 192.0.2.1:5 sent 5?[2J?nonsense (and 99 more like it in the last 0 s)",
    ]
    for number in range(1000):  # of as many kinds as somebody likes
        heard.say("x" * number)
    assert len(capfd.readouterr().err.splitlines()) < 40


# ---- shortages


WITHOUT_DESCRIPTORS = """
import os, resource, sys, threading, time, bodies
server = bodies.small_expert(sys.argv[1], max_peers=4)
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
hog = []
try:
    while True: hog.append(open("/dev/null"))
except OSError: pass
for _ in range(int(sys.argv[2])): hog.pop().close()
print("short", flush=True)
time.sleep(0.7)
for file in hog: file.close()
print("no more", flush=True)
assert server.wait_peer(0, 20)
bodies.small_answer(server)
sys.stdin.readline()
"""


@pytest.mark.parametrize("num_left", [0, 1, 3], ids=["none", "for the connection", "for some of what comes with it"])
def test_a_moment_without_descriptors_passes(num_left: int, tmp_path: Path) -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(program(WITHOUT_DESCRIPTORS, tmp_path, num_left), **pipes, text=True)
    assert process.stdout is not None and process.stdout.readline() == "short\n"
    with small_attention(tmp_path) as comm:
        small_dispatch(comm)
        comm.combine_recv()
        _, said = process.communicate("\n", timeout=20)
    assert process.returncode == 0, said
    assert 1 <= said.count("no file descriptors left") <= 2 and "not a message of m2n" not in said


def test_descriptors_that_there_is_no_room_for_are_a_shortage_of_this_process() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        socket.send_fds(theirs, [b"{}"], [0, 0, 0])
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            with pytest.raises(Shortage, match=f"process {os.getpid()} has no file descriptors left"):
                UnixChannel(ours, Deadline(SOON_S)).receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        socket.send_fds(theirs, [b"{}"], [0] * 6)
        with pytest.raises(Again, match="not a message of m2n: too long"):
            UnixChannel(ours, Deadline(SOON_S)).receive()


def test_a_moment_without_threads_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start, num_refused = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal num_refused
        if thread.name == "m2n-handshake" and num_refused < 3:
            num_refused += 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        small_dispatch(comm)
        assert small_answer(server) and num_refused == 3
    assert capfd.readouterr().err.count("can't start new thread") == 1


def test_what_fails_here_is_raised_at_once_and_told_the_other_side(capfd: pytest.CaptureFixture[str]) -> None:
    with in_this_host("shm") as (_, native, address):
        native.is_over_network = False
        ours = FakeNative(is_over_network=False)
        ours.cannot_attach = "shm: cannot map the peer's memory object: Cannot allocate memory"
        with pytest.raises(m2n.SetupError, match="Cannot allocate memory") as caught:
            bootstrap._greet(ours, identity("attention", transport="shm"), address, 0, Deadline(SOON_S))
        assert not isinstance(caught.value, (Again, Refused)) and ours.withdrawn == [0]
        until(lambda: native.withdrawn == [0])
        assert native.watched == ours.watched == []
        ours.cannot_attach, native.cannot_attach = "", "shm: cannot allocate 5 bytes of shared memory"
        with pytest.raises(Refused, match="refused by expert rank 0: shm: cannot allocate 5 bytes"):
            bootstrap._greet(ours, identity("attention", transport="shm"), address, 0, Deadline(SOON_S))
    assert "a peer could not join: it says: shm: cannot map the peer's memory object" in capfd.readouterr().err
