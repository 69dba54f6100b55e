# SPDX-License-Identifier: Apache-2.0
"""A process with two ranks that exchange, for test_strangers.py. Usage: attacked.py TRANSPORT STORE [insecure].

It prints its pid, the address of bytes that nobody may read or write, and where its expert rank listens. Then it reads
lines: first the address by which its attention rank shall join, then one for each time that it shall exchange; it
answers "right" and whether those bytes are what they were.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import bodies
import numpy as np
from bodies import SMALL, small_answer, small_attention, small_dispatch, small_expert

import m2n
from m2n.deadline import Deadline
from m2n.handshake import Identity
from m2n.store import PathStore, look_up

KEY = "the key that nobody tells"
SECRET = b"bytes that nobody may read or write"


def main() -> None:
    transport, store, is_insecure = sys.argv[1], sys.argv[2], len(sys.argv) > 3
    secret = ctypes.create_string_buffer(SECRET)
    variables = {} if transport != "ucx" else {"TLS": "tcp,self" if is_insecure else "posix,sysv,cma,self"}
    bodies.NUMPY = m2n.Config(
        transport=transport, bind="127.0.0.1", job_key=KEY, insecure=is_insecure, ucx_variables=variables,
        arrays="numpy", timeout_s=20, connect_timeout_s=20,
    )  # fmt: skip
    key = Identity("default", "default", "expert", 0, SMALL).store_key("expert", 0)
    with small_expert(store, max_peers=4) as server:
        published = look_up(PathStore(store), key, Deadline(5.0))
        assert published is not None
        address = json.loads(published)
        print(os.getpid(), ctypes.addressof(secret), address["network_address"], flush=True)
        by = sys.stdin.readline().strip()
        if by:  # as if this rank were of another host
            address.update(host="elsewhere", network_address=by)
            PathStore(store).set(key, json.dumps(address))
        with small_attention(store) as comm:
            while True:
                for _ in range(5):
                    expected = small_dispatch(comm)
                    assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)
                print("right", secret.value == SECRET, flush=True)
                if not sys.stdin.readline():
                    break
            assert [peer.state for peer in comm.peers()] == ["live"]


if __name__ == "__main__":
    main()
