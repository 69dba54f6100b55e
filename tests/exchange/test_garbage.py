# SPDX-License-Identifier: Apache-2.0
"""A peer that writes what it likes: every word it may write is checked, and the others go on."""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import ONE, SMALL, small_attention, small_expert
from small_case import IDS, WEIGHTS, X, answer, dispatch
from waits import SOON_S

import m2n
from m2n import _C, bootstrap
from m2n.channel import UnixChannel, close_all
from m2n.deadline import Deadline
from m2n.store import PathStore


class FakePeer:
    """An attention rank that writes what it likes into an expert rank's window."""

    def __init__(self, server: m2n.ExpertComm, store: Path) -> None:
        self._native = _C.AttentionComm(SMALL._native(), 0, 4, "shm")
        identity = bootstrap.Identity("default", "default", "attention", 0, SMALL)
        entry = bootstrap.json.loads(
            bootstrap.look_up(PathStore(store), identity.store_key("expert", 0), Deadline(5.0))
        )
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + entry["address"])
        channel = UnixChannel(self.connection, Deadline(5.0))
        offer = self._native.offer(0, entry["life"])
        fds = [fd for fd, _ in offer["objects"]]
        introduction = {**bootstrap.introduction(identity, offer, "shm"), "to_life": entry["life"]}
        channel.send(introduction, fds)
        message, theirs = channel.receive()
        assert "error" not in message
        channel.send({"joined": True}, [])
        self.small = mmap.mmap(theirs[1], 0)
        for fd in [*fds, *theirs]:
            os.close(fd)
        assert server.wait_peer(0)

    def write(
        self,
        seq: int = 1,
        num_rows: int = 1,
        header_rows: int | None = None,
        microbatch: int = 0,
        flags: int = 0,
        ids: tuple[int, ...] = (0, 1),
        weights: tuple[float, ...] = (0.5, 0.5),
    ) -> None:
        num_slots = SMALL.microbatches + 1
        header_rows = num_rows if header_rows is None else header_rows
        struct.pack_into("<6I", self.small, num_slots * 128, 0, microbatch, 0, flags, header_rows, 0)
        ids_at = 2 * num_slots * 128
        struct.pack_into("<2i", self.small, ids_at, *ids)
        struct.pack_into("<2f", self.small, ids_at + num_slots * 128, *weights)
        struct.pack_into("<Q", self.small, 0, num_rows << 32 | seq)


@pytest.mark.parametrize(
    "garbage, words",
    [
        ({"seq": 2}, "expected message 1"),
        ({"seq": 0xFFFFFFFF}, "expected message 1"),
        ({"num_rows": 9}, "bad number of rows 9"),
        ({"num_rows": 0xFFFFFFFF}, "bad number of rows"),
        ({"header_rows": 3}, "bad number of rows in the header 3"),
        ({"microbatch": 1}, "bad microbatch 1"),
        ({"flags": 128}, "bad flags 128"),
        ({"ids": (4, 0)}, "expert id out of range: 4"),
        ({"ids": (-2, 0)}, "expert id out of range: -2"),
        ({"ids": (2**31 - 1, 0)}, "expert id out of range"),
        ({"ids": (-1, 0)}, "expert id out of range: -1"),
        ({"weights": (math.nan, 0.0)}, "weight not finite"),
        ({"weights": (0.5, math.inf)}, "weight not finite"),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_garbage_from_a_peer_is_a_protocol_error_and_the_peer_is_told(
    device: str, garbage: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with small_expert(tmp_path, device=device) as server:
        fake = FakePeer(server, tmp_path)
        fake.write(**garbage)
        with pytest.raises(m2n.ProtocolError, match=words) as caught:
            server.dispatch_recv()
        assert caught.value.peer == 0
        fake.connection.settimeout(SOON_S)
        told = fake.connection.recv(1024)  # why, and then the connection is closed
        assert told[:1] == b"D" and words in told[3:].decode() and "as expert rank 0 saw it" in told[3:].decode()
        assert fake.connection.recv(1) == b""
        fake.connection.close()
        server.recover(0)
        with small_attention(tmp_path, rank=1, device=device) as comm:  # the others go on
            dispatch(comm)
            answer(server)
            assert np.isfinite(comm.combine_recv()).all()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_message_before_the_reply_is_a_protocol_error(device: str, tmp_path: Path) -> None:
    with small_expert(tmp_path, device=device) as server:
        fake = FakePeer(server, tmp_path)
        fake.write()
        batch = server.dispatch_recv()
        fake.write(seq=2)
        with pytest.raises(m2n.ProtocolError, match="after the reply to the last one"):
            server.dispatch_recv()
        server.combine_send(batch, batch.gather())
        fake.connection.close()


def introduced(**changes: Any) -> bytes:
    identity = bootstrap.Identity("default", "default", "attention", 0, SMALL)
    offer = {"process": 1, "device": "", "wakes": True, "objects": [(0, 1), (0, 2), (0, 3)], "address": b"", "link": 1}
    return json.dumps({**bootstrap.introduction(identity, offer, "shm"), **changes}).encode()


def test_garbage_at_the_listener_keeps_nobody_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_expert(tmp_path) as server:
        identity = bootstrap.Identity("default", "default", "attention", 0, SMALL)
        entry = bootstrap.json.loads(
            bootstrap.look_up(PathStore(tmp_path), identity.store_key("expert", 0), Deadline(5.0))
        )
        for garbage in (
            b"",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b'{"m2n": 1}',
            b'{"m2n": 1, "shape": 3}',
            b"[" * 60000,
            b"1" * 65536,
            introduced(rank=2**40),
            introduced(rank=True),
            introduced(life=-1),
            introduced(objects=[1, 2]),
            introduced(objects=[1, 2, None]),
            introduced(to_life=0),
            introduced(to_life=entry["life"]),  # right in all, but without the descriptors
        ):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect("\0" + entry["address"])
            try:
                connection.send(garbage)
                connection.settimeout(SOON_S)
                connection.recv(4096)
            except OSError:
                pass
            connection.close()
        stuck = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stuck.connect("\0" + entry["address"])
        with small_attention(tmp_path) as comm:
            dispatch(comm)
            answer(server)
            assert np.isfinite(comm.combine_recv()).all()
        stuck.close()
    assert "a peer could not join" in capfd.readouterr().err


class FakeExpert:
    """An expert rank that writes what it likes into an attention rank's window, after a dispatch of layer 5."""

    def __init__(self, device: str) -> None:
        shape, hosts = SMALL._native(), (ONE._offsets, ONE._ranks, 1)
        self.is_launched = device != "cpu"
        self.memory: Any = _C.ExpertComm(shape, 0, 1, "shm", [0, 1, 2, 3])  # which the messages go into
        self.native: Any = _C.AttentionComm(shape, 0, 1, "shm")
        if self.is_launched:
            self.native = _C.DeviceAttentionComm(shape, 0, 1, "shm", device, *hosts, 0)
        own, other = self.native.offer(0, 1), self.memory.offer(0, 1)
        self.small = mmap.mmap(own["objects"][1][0], 0)
        self.native.attach(0, other["objects"], other["process"], other["device"], True, b"")
        close_all([fd for fd, _ in own["objects"]])
        ours, self.connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(SOON_S)
        self.native.watch(0, ours.detach(), -1, 0, 0)
        if self.is_launched:
            route = self.native.make_route(IDS, WEIGHTS, [], None, None, 0)
            self.native.dispatch_send(X, route, 0, 5, SOON_S, 0, 1, 0)
        else:
            route = _C.Route(shape)
            route.build_from_topk(IDS, WEIGHTS, ONE._native(), 1, 0, False)
            self.native.dispatch_send(X, route, 0, 5, SOON_S, 0)

    def reply(self, layer: int, microbatch: int, num_rows: int) -> None:
        header_at = (SMALL.microbatches + 1) * 128
        struct.pack_into("<6I", self.small, header_at, layer, microbatch, 0, 0, num_rows, 0)
        struct.pack_into("<Q", self.small, 0, num_rows << 32 | 1)

    def receive(self) -> np.ndarray:
        y = np.zeros_like(X)
        self.native.combine_recv(y, 0, SOON_S, False, *((1, 0) if self.is_launched else ()))
        self.native.check()
        return y


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("layer, microbatch, num_rows", [(4, 0, 3), (5, 1, 3), (6, 0, 0xFFFFFFFF), (5, 0, 2)])
def test_a_reply_to_something_else_is_a_protocol_error(device: str, layer: int, microbatch: int, num_rows: int) -> None:
    fake = FakeExpert(device)
    fake.reply(layer, microbatch, num_rows)
    with pytest.raises(m2n.ProtocolError, match="expert rank 0 broke the protocol and was dropped: .*expected a reply"):
        fake.receive()
    assert b"as attention rank 0 saw it" in fake.connection.recv(1024)
    if device == "cpu":  # its rows will not come, which is told until the caller goes without them
        with pytest.raises(m2n.PeerLost, match="it broke the protocol; rows of 3 tokens"):
            fake.receive()
    fake.native.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_reply_to_the_right_batch_is_taken(device: str) -> None:
    fake = FakeExpert(device)
    fake.reply(5, 0, 3)
    assert not fake.receive().any()
    fake.native.close()
