# SPDX-License-Identifier: Apache-2.0
"""Control connections of the native watcher: heartbeats over a stream, silence, clocks; the other end is the test."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from libraries import CXX, ROOT
from processes import program
from tiers import needs_compiler
from watched import HEARTBEAT_S, LOST_AFTER_S, PATIENCE_S, Watched


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.native.close()
    made.end.close()


def test_heartbeats_come_in_their_period_and_keep_the_peer_alive(watched: Watched) -> None:
    began = time.monotonic()
    for _ in range(12):
        watched.read()
        watched.end.sendall(watched.beat())
    assert time.monotonic() - began > 10 * HEARTBEAT_S > LOST_AFTER_S
    assert watched.peer[0] == "live"


def test_the_first_heartbeat_of_a_peer_is_answered_at_once() -> None:
    watched = Watched(send_every_s=3600, lost_after_s=3600)
    watched.read()
    watched.end.sendall(watched.beat(sent_ns=7, echo_ns=0))
    assert watched.read()[1] == 7
    watched.native.close()


def test_a_silent_peer_is_lost_after_so_long_and_not_before(watched: Watched) -> None:
    watched.read()
    watched.end.sendall(watched.beat())
    began = time.monotonic()
    state, cause = watched.wait_end()
    assert (state, "three heartbeats" in cause) == ("lost", True)
    assert time.monotonic() - began >= LOST_AFTER_S - 0.01
    while watched.end.recv(4096):  # what it had sent, and the end
        pass


def test_without_heartbeats_silence_is_no_loss() -> None:
    quiet = Watched(send_every_s=0, lost_after_s=0)
    time.sleep(2 * LOST_AFTER_S)
    assert quiet.peer[0] == "live"
    quiet.end.setblocking(False)
    with pytest.raises(BlockingIOError):
        quiet.end.recv(1)
    quiet.native.close()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "packets"])
def test_messages_may_come_in_pieces_and_together(stream: bool) -> None:
    watched = Watched(lost_after_s=PATIENCE_S, stream=stream)
    text = watched.beat() * 3 + b"G"
    for piece in (text[:1], text[1:7], text[7:60], text[60:-1]):
        watched.end.send(piece)
        time.sleep(0.01)
        assert watched.peer[0] == "live"
    watched.end.send(text[-1:])
    assert watched.wait_end()[0] == "left"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "packets"])
@pytest.mark.parametrize(
    "reason, words", [("", ""), ("it \x1b[31mhangs\n", ": it ?[31mhangs?"), ("ü" * 256, ": " + "ü" * 256)]
)
def test_a_dropped_link_says_why_also_in_pieces(reason: str, words: str, stream: bool) -> None:
    watched = Watched(lost_after_s=PATIENCE_S, stream=stream)
    text = reason.encode()
    message = b"D" + struct.pack("<H", len(text)) + text
    for piece in (message[:2], message[2:3], message[3:-1], message[-1:]) if stream and text else (message,):
        assert watched.peer[0] == "live"
        watched.end.send(watched.beat() + message if piece is message else piece)
        time.sleep(0.005)
    assert watched.wait_end() == ("lost", "it dropped this link" + words)
    watched.native.close()


def test_who_is_dropped_is_told_why(watched: Watched) -> None:
    watched.native.drop(0, "é" * 300)  # cut, but not within a character
    told = b""
    while b"D" not in told or len(told) < told.index(b"D") + 3 + 512:
        told += watched.end.recv(4096)
    assert told[told.index(b"D") + 1 :] == struct.pack("<H", 512) + ("é" * 256).encode()
    assert watched.peer == ("lost", "this rank dropped it: " + "é" * 300)


@needs_compiler
def test_whatever_a_peer_says_and_a_listener_that_fails_is_survived(tmp_path: Path) -> None:
    program = tmp_path / "words"
    options = ["-std=c++20", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    sources = ["tests/transport/watcher_words.cc", "csrc/transport/control.cc", "csrc/transport/watcher.cc"]
    command = [CXX, *options, *(str(ROOT / source) for source in sources), "-o", str(program), "-lpthread"]
    subprocess.run(command, check=True, timeout=100)
    done = subprocess.run([str(program), "1", "20000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("text", [b"X", b"\0", b"H" + bytes(24) + b"?", b"D\x01\x02" + b"a" * 513], ids=repr)
def test_anything_else_breaks_the_protocol(text: bytes, watched: Watched) -> None:
    watched.end.sendall(text)
    assert watched.wait_end() == ("lost", "it broke the protocol")


def test_the_clock_of_a_peer_is_known_to_half_a_round_trip(watched: Watched) -> None:
    ahead_ns = 5_000_000_000_000
    assert watched.native.clock_offsets() == []
    for _ in range(4):
        sent_ns, _, _ = watched.read()
        got_ns = time.monotonic_ns()
        watched.end.sendall(watched.beat(time.monotonic_ns() + ahead_ns, sent_ns, time.monotonic_ns() - got_ns))
    sent_ns, echo_ns, held_ns = watched.read()
    assert echo_ns > ahead_ns and 0 <= held_ns < PATIENCE_S * 1e9  # it repeats what it got
    ((rank, found_ns, round_trip_ns),) = watched.native.clock_offsets()
    assert rank == 0 and 0 < round_trip_ns < PATIENCE_S * 1e9
    assert abs(found_ns - ahead_ns) <= round_trip_ns / 2 + 1000


def test_clocks_that_cannot_be_are_not_believed(watched: Watched) -> None:
    for numbers in ((1, 2**63 - 1, 0), (-(2**63), 1, 2**63 - 1), (0, -(2**63), -(2**63))):
        watched.read()
        watched.end.sendall(watched.beat(*numbers))
    watched.read()
    assert all(round_trip_ns > 0 for _, _, round_trip_ns in watched.native.clock_offsets())
    assert watched.peer[0] == "live"


STOPPED = """
import os, signal, sys, threading, time
from watched import HEARTBEAT_S, Watched
watched = Watched()
print(os.getpid(), flush=True)
def answer():
    while True:
        watched.read()
        watched.end.sendall(watched.beat())
# The other end goes on while this process is stopped: a child that shares the connection.
if os.fork() == 0:
    answer()
time.sleep(10 * HEARTBEAT_S)
print(watched.peer[0], flush=True)
sys.stdin.readline()
time.sleep(10 * HEARTBEAT_S)
print(watched.peer[0], flush=True)
os.kill(0, signal.SIGKILL)
"""


def test_a_process_that_was_stopped_does_not_call_others_silent() -> None:
    """It could not hear them: what lies in its connections counts, and time in which it did not run does not."""
    with subprocess.Popen(
        program(STOPPED), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin and process.stdout
        process_id = int(process.stdout.readline())
        assert process.stdout.readline() == "live\n"
        os.kill(process_id, signal.SIGSTOP)
        time.sleep(4 * LOST_AFTER_S)
        os.kill(process_id, signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "live\n"
