# SPDX-License-Identifier: Apache-2.0
"""Handshakes made by hypothesis: any JSON, any bytes, any descriptors, at both ends. Nothing but SetupError comes out,
no descriptor is left behind, and a proper peer can still join. M2N_FUZZ_SECONDS sets about how long (8)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import SMALL, small_attention, small_expert
from handshakes import KEY, frame, greet, listener
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from small_case import answer, dispatch
from waits import SOON_S, until

import m2n
from m2n import _C, bootstrap
from m2n.channel import TcpChannel, UnixChannel, close_all, join_address, split_address
from m2n.data_connection import MAGIC
from m2n.deadline import Deadline
from m2n.interfaces import host_name
from m2n.listener import Listener
from m2n.store import PathStore
from m2n.waiting_room import WaitingRoom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SECONDS = int(os.environ.get("M2N_FUZZ_SECONDS", "8"))
LIFE = 77
MAX_PEERS = 1024


def fuzz(examples_per_s: int, without: tuple[Phase, ...] = ()) -> settings:
    return settings(
        max_examples=examples_per_s * SECONDS,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase not in without],
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 3, LIFE, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["attention", "expert", "shm", "error"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def introduction(role: str) -> dict[str, Any]:
    """What a proper peer of that role says; another process, so that its descriptors are looked at."""
    identity = bootstrap.Identity("default", "default", role, 0, SMALL, life=LIFE)
    offer = {"process": 1, "device": "", "wakes": True, "objects": [(0, 1), (0, 2), (0, 3)], "address": b"", "link": 1}
    return {**bootstrap.introduction(identity, offer, "shm"), "to_life": LIFE}


@st.composite
def mutated(draw: Callable[[st.SearchStrategy[Any]], Any], role: str) -> bytes:
    """A proper introduction with some values, at any depth, that are others or gone."""
    message = introduction(role)
    for _ in range(draw(st.integers(0, 2))):
        at: Any = message
        while True:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
                break
            at = at[key]
        if draw(st.booleans()):
            at[key] = draw(json_values)
        else:
            del at[key]
        if not message:
            break
    return json.dumps(message).encode()


def garbled(text: bytes, at: int, junk: bytes, num_removed: int) -> bytes:
    at %= len(text) + 1
    return text[:at] + junk + text[at + num_removed :]


def messages(role: str) -> st.SearchStrategy[bytes]:
    good = mutated(role)
    return st.one_of(
        good,
        good,
        st.builds(garbled, good, st.integers(0, 1000), st.binary(max_size=6), st.integers(0, 10)),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=50),
        # Deep ones, at any distance from where Python gives up.
        st.integers(1, 1100).map(lambda depth: b'{"m2n": 1, "role": ' + b"[" * depth + b"]" * depth + b"}"),
        st.sampled_from([b"", b"[" * 60000, b"1" * 60000, b'{"rank": ' + b"9" * 60000 + b"}", b" " * 65536]),
    )


JOINED = b'{"joined": true}'
last_words = st.just(JOINED) | st.sampled_from([b"", b"{}", b'{"error": "no memory"}']) | st.binary(max_size=20)


def sealed_object(num_bytes: int) -> int:
    """A memory object as the transport makes them."""
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.truncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def sizes_of_objects(comm: Any) -> list[int]:
    fds = [fd for fd, _ in comm.offer(0, 1)["objects"]]
    sizes = [os.fstat(fd).st_size for fd in fds]
    close_all(fds)
    return sizes


# What a proper peer of a role sends.
RIGHT_BYTES = {
    "attention": sizes_of_objects(_C.AttentionComm(SMALL._native(), 0, 1, "shm")),
    "expert": sizes_of_objects(_C.ExpertComm(SMALL._native(), 0, 1, "shm", [0])),
}


def make_fds(kinds: list[str], role: str) -> list[int]:
    fds = []
    for i, kind in enumerate(kinds):
        if kind == "right":  # sealed, and as large as the other side wants it
            fds.append(sealed_object(RIGHT_BYTES[role][i % 3]))
        elif kind == "small":
            fds.append(sealed_object(1))
        else:
            fds.append(os.open("/dev/null", os.O_RDONLY))
    return fds


descriptors = st.lists(st.sampled_from(["right", "small", "null"]), max_size=5) | st.just(["right"] * 3)


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def await_fds(expected: int) -> None:
    """What threads of this process still close is waited for."""
    deadline = time.monotonic() + SOON_S
    while num_fds() > expected:  # fewer: what an earlier test left to be closed
        assert time.monotonic() < deadline, f"{num_fds() - expected} descriptors were left behind"
        time.sleep(0.001)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, text: bytes, fds: list[int]) -> None:
    try:
        socket.send_fds(connection, [text], fds)
    except OSError:  # an empty message with descriptors, or the other side is gone already
        pass
    for fd in fds:
        os.close(fd)


@fuzz(60)
@given(messages("attention"), descriptors)
@example(b"[" * 60000, ["null"] * 3)
def test_what_is_received_is_a_message_or_a_setup_error(text: bytes, kinds: list[str]) -> None:
    identity = bootstrap.Identity("default", "default", "expert", 0, SMALL, life=LIFE)
    before = num_fds()
    ours, theirs = pair()
    with ours, theirs:
        send(theirs, text, make_fds(kinds, "attention"))
        theirs.shutdown(socket.SHUT_WR)
        try:
            message, fds = UnixChannel(ours, Deadline(SOON_S)).receive()
        except m2n.SetupError:
            pass
        else:
            try:
                bootstrap.check_introduction(identity, message, len(fds), "shm")
                assert message["role"] == "attention" and sum(message["has_fd"]) == len(fds)
                assert all(0 <= number < 2**64 for number in message["objects"])
            except m2n.SetupError:
                pass
            finally:
                close_all(fds)
    assert num_fds() == before


@pytest.fixture(autouse=True)
def _watcher() -> None:
    """The watcher's own descriptor is made with the first link of the process, and stays."""
    native = _C.AttentionComm(SMALL._native(), 0, 1, "shm")
    offer = native.offer(0, 1)
    close_all([fd for fd, _ in offer["objects"]])
    ours, theirs = pair()
    native.watch(offer["peer_idx"], ours.detach(), -1, 0, 0)
    native.close()
    theirs.close()


@pytest.fixture
def pidfds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads of one process watch no pidfd: here they do, so that one that is left behind is seen."""
    init = UnixChannel.__init__

    def with_pidfd(self: UnixChannel, *about: Any) -> None:
        init(self, *about)
        self.pidfd = os.pidfd_open(os.getpid())

    monkeypatch.setattr(UnixChannel, "__init__", with_pidfd)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """How each handshake at the listener has ended."""
    ends: list[BaseException | None] = []
    welcome = Listener._welcome

    def watched(self: Any, channel: Any, room: WaitingRoom) -> None:
        end: BaseException | None = None
        try:
            welcome(self, channel, room)
        except BaseException as error:
            end = error
            raise
        finally:
            ends.append(end)

    monkeypatch.setattr(Listener, "_welcome", watched)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # `ends` has it
    return ends


def await_end(ended: list[BaseException | None], num_before: int) -> None:
    """Waits until one more handshake is over, with its thread."""
    until(lambda: len(ended) > num_before, "the end of a handshake")
    until(lambda: all(thread.name != "m2n-handshake" for thread in threading.enumerate()), "the end of its thread")
    assert ended[-1] is None or isinstance(ended[-1], (m2n.SetupError, ConnectionError)), repr(ended[-1])


def test_whatever_knocks_at_the_listener_leaves_nothing_and_keeps_nobody_out(
    tmp_path: Path, pidfds_count: None, ended: list[BaseException | None]
) -> None:
    with small_expert(tmp_path, max_peers=MAX_PEERS) as server:
        key = bootstrap.Identity("default", "default", "attention", 0, SMALL).store_key("expert", 0)
        entry = json.loads(bootstrap.look_up(PathStore(tmp_path), key, Deadline(5.0)))
        joined = 0

        @fuzz(20, without=(Phase.shrink, Phase.explain))  # each look at a leak takes seconds
        @given(messages("attention"), descriptors, st.booleans(), last_words)
        @example(json.dumps(introduction("attention")).encode(), ["right"] * 3, True, JOINED)
        def knock(text: bytes, kinds: list[str], is_patient: bool, joined_by: bytes) -> None:
            nonlocal joined
            before, num_ended = num_fds(), len(ended)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(SOON_S)
                connection.connect("\0" + entry["address"])
                text = text.replace(b'"to_life": %d' % LIFE, b'"to_life": %d' % entry["life"])
                send(connection, text, make_fds(kinds, "attention"))
                if not is_patient:
                    connection.shutdown(socket.SHUT_WR)
                else:
                    reply, fds, _, _ = socket.recv_fds(connection, 65536, 3)
                    close_all(fds)
                    joined += len(fds) == 3
                    assert not fds or "error" not in json.loads(reply)
                    if fds:
                        send(connection, joined_by, [])
            await_end(ended, num_ended)
            await_fds(before)

        knock()
        assert joined > 0, "no example was a proper introduction"
        for info in server.peers():
            if info.state == "lost":
                server.recover(info.rank)
        with small_attention(tmp_path, rank=1) as comm:
            dispatch(comm)
            answer(server)
            assert np.isfinite(comm.combine_recv()).all()


def test_whatever_answers_a_joiner_leaves_nothing(pidfds_count: None) -> None:
    native = _C.AttentionComm(SMALL._native(), 0, MAX_PEERS, "shm")
    identity = bootstrap.Identity("default", "default", "attention", 0, SMALL)
    joined = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind("")  # an address that the kernel picks
        listening.listen(8)
        address = bootstrap.Address(LIFE, listening.getsockname()[1:].decode(), host_name(), "")

        @fuzz(20, without=(Phase.shrink, Phase.explain))  # each look at a leak takes seconds
        @given(messages("expert"), descriptors)
        @example(json.dumps(introduction("expert")).encode(), ["right"] * 3)
        def greet(text: bytes, kinds: list[str]) -> None:
            nonlocal joined
            before = num_fds()

            def serve() -> None:
                connection, _ = listening.accept()
                with UnixChannel(connection, Deadline(SOON_S)) as channel:
                    close_all(channel.receive()[1])
                    send(connection, text, make_fds(kinds, "expert"))
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)  # what it says to that

            server = threading.Thread(target=serve)
            server.start()
            try:
                bootstrap._greet(native, identity, address, 0, Deadline(SOON_S))
                joined += 1
            except m2n.SetupError:
                pass
            finally:
                server.join(SOON_S)
            await_fds(before)

        greet()
    assert joined > 0, "no example was a proper introduction"
    native.close()


hellos = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=60).map(lambda rest: MAGIC + rest),
    st.binary(min_size=48, max_size=48).map(lambda rest: MAGIC + rest),
    json_values.map(lambda value: frame(json.dumps(value).encode())),
    st.builds(lambda nonce, keyed: frame(json.dumps({"m2n": 4, "nonce": nonce.hex(), "is_keyed": keyed}).encode()),
              st.binary(min_size=32, max_size=32), st.booleans()),
)  # fmt: skip


def test_whatever_connects_to_a_network_address_gets_nothing_and_keeps_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bootstrap, "host_name", lambda: "here")
    with listener(job_key=KEY) as (_, native, address):
        where = split_address(address.network_address)

        @fuzz(20, without=(Phase.shrink, Phase.explain))
        @given(st.lists(hellos, max_size=3))
        def knock(texts: list[bytes]) -> None:
            before = num_fds()
            with socket.create_connection(where) as connection:
                connection.settimeout(SOON_S)
                try:
                    for text in texts:
                        connection.sendall(text)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                except OSError:  # it has hung up
                    pass
            await_fds(before)

        knock()
        assert native.offered == []
        ours = greet(address, job_key=KEY)
        assert len(native.offered) == 1
        ours.data.close()
        assert native.is_watched.wait(SOON_S)
        native.data.close()


@fuzz(20, without=(Phase.shrink, Phase.explain))
@given(json_values | st.binary(min_size=16, max_size=16).map(bytes.hex))
def test_whatever_is_told_for_a_token_is_a_setup_error(token: Any) -> None:
    before = num_fds()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = bootstrap.Address(LIFE, "none", "there", join_address(*server.getsockname()[:2]))

        def serve() -> None:
            channel = TcpChannel(server.accept()[0], KEY, True, Deadline(SOON_S))
            with channel:
                channel.receive()
                channel.send({"token": token}, [])
            server.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(m2n.SetupError):
            greet(address, job_key=KEY)
        thread.join(SOON_S)
    await_fds(before)
