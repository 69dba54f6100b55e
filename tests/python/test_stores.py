# SPDX-License-Identifier: Apache-2.0
"""Stores: where they listen, what a stranger leaves in them, and that they may be served later."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from bodies import ONE, SMALL, small_attention, small_expert

import m2n
from m2n import bootstrap
from m2n.channel import Again, join_address
from m2n.deadline import Deadline
from m2n.handshake import Identity
from m2n.store import PathStore, describe_store, look_up, open_store

KEY = Identity("default", "default", "attention", 0, SMALL).store_key("expert", 0)


def listening() -> set[tuple[str, int]]:
    """Where this process listens for TCP."""
    connections = psutil.Process().net_connections("tcp")
    return {tuple(connection.laddr) for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_hosted_store_listens_where_it_was_asked_to_and_nowhere_else(host: str) -> None:
    before = listening()
    with m2n.host_store(f"tcp://{host}:0") as hosted:
        assert hosted.url.startswith(f"tcp://{host}:")
        (address,) = listening() - before
        assert address[0] in ("127.0.0.1", "::1") and hosted.url.endswith(f":{address[1]}")
        store: Any = open_store(hosted.url, Deadline(5.0), 5.0)
        store.set("key", "value")
        assert look_up(store, "key", Deadline(5.0)) == b"value"
        assert store.compare_set("key", "value", "next") == b"next" and store.add("count", 2) == 2
        with small_expert(hosted.url), small_attention(hosted.url) as comm:
            assert comm.peers()[0].state == "live"
    assert listening() == before


def entry(**changes: Any) -> bytes:
    return json.dumps({"life": 1, "address": "m2n-0", "host": "there", "network_address": "", **changes}).encode()


STRANGE = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[1, 2, 3]",
    "nothing": b"",
    "deep": b"[" * 3000,
    "huge": b'{"life": ' + b"9" * 5000 + b"}",
    "long": b" " * (2 << 20),
    "a life that is none": entry(life="one"),
    "a negative life": entry(life=-1),
    "a large life": entry(life=2**64),
    "a life that is true": entry(life=True),
    "an address that is no text": entry(address=3),
    "a long address": entry(address="m" * 200),
    "an address with a zero byte": entry(address="m\0n"),
    "an address that cannot be encoded": entry(address="\ud800"),
    "a host that is none": entry(host=None),
    "a port out of range": entry(network_address="127.0.0.1:65536"),
    "a negative port": entry(network_address="127.0.0.1:-1"),
    "port 0": entry(network_address="127.0.0.1:0"),
    "digits of another script": entry(network_address="127.0.0.1:\u0661\u0662"),
    "no port": entry(network_address="127.0.0.1"),
    "a name": entry(network_address="localhost:80"),
    "a name that none can have": entry(network_address="." * 90 + ":80"),
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_what_a_stranger_leaves_in_a_store_is_an_error_that_names_the_key(value: bytes, tmp_path: Path) -> None:
    store = PathStore(tmp_path)
    store.set(KEY, value)
    read = look_up(store, KEY, Deadline(5.0))
    assert read is not None
    with pytest.raises(Again, match=f"the value of '{KEY}' is not an address of m2n"):
        bootstrap.Address.parse(KEY, read)


@pytest.mark.parametrize("value", [None, 3, ["x"]], ids=str)
def test_a_store_that_gives_no_bytes_is_named(value: Any) -> None:
    class Strange(dict[str, Any]):
        def wait(self, keys: list[str], timeout: Any) -> None:
            pass

        def set(self, key: str, value: Any) -> None:
            self[key] = value

    store: Any = Strange()
    store.set(KEY, value)
    with pytest.raises(Again, match=f"the value of '{KEY}' is neither str nor bytes"):
        look_up(store, KEY, Deadline(1.0))


def test_a_rank_whose_entry_was_spoilt_is_joined_once_it_is_right_again(tmp_path: Path) -> None:
    with small_expert(tmp_path):
        store = PathStore(tmp_path)
        right = look_up(store, KEY, Deadline(5.0))
        assert right is not None
        store.set(KEY, entry(network_address="127.0.0.1:99999"))
        threading.Timer(0.2, store.set, (KEY, right)).start()
        with small_attention(tmp_path) as comm:
            assert comm.peers()[0].state == "live"
        os.remove(store._file(KEY))
        os.mkfifo(store._file(KEY))  # whose reader would wait for a writer
        config = m2n.Config(connect_timeout_s=0.2)
        with pytest.raises(m2n.SetupError, match="could not be joined within .*is not an address of m2n"):
            m2n.AttentionComm(0, SMALL, ONE, tmp_path, config=config)


def test_a_store_may_be_served_after_its_ranks_have_begun(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"tcp://{join_address(*free.getsockname())}"
    comms: list[Any] = []
    config = m2n.Config(store_timeout_s=0.1, connect_timeout_s=20, arrays="numpy")

    def join() -> None:
        comms.append(m2n.AttentionComm(0, SMALL, ONE, url, config=config))

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(0.5)  # several attempts
    with m2n.host_store(url), small_expert(url):
        thread.join(20)
        assert [comm.peers()[0].state for comm in comms] == ["live"]
        comms[0].close()
    waiting = [line for line in capfd.readouterr().err.splitlines() if "waits for its store" in line]
    assert len(waiting) == 1 and url in waiting[0] and "attention rank 0" in waiting[0]


def test_ranks_that_do_not_meet_are_told_which_store_each_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_store("here") == describe_store(Path("here")) == f"{tmp_path}/here"
    store = PathStore("here")
    monkeypatch.chdir("/")
    store.set("key", "value")
    assert (tmp_path / "here/key").read_bytes() == b"value"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(m2n.SetupError) as caught:
        m2n.AttentionComm(0, SMALL, ONE, "here", config=m2n.Config(connect_timeout_s=0.1))
    assert f"process {os.getpid()} on {socket.gethostname()}, store {tmp_path}/here"[:120] in str(caught.value)
