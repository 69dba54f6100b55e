# SPDX-License-Identifier: Apache-2.0
"""The transport `ucx`: finding UCX, keeping it from TCP, what a bad peer can send, and what is refused.

What holds over every network stands in `test_networks.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import psutil
import pytest
from bodies import ONE, SMALL, small_answer, small_attention, small_dispatch, small_expert
from libraries import CXX, build_libraries
from processes import fork
from tiers import needs_compiler

import m2n
from m2n import _C

ROOT = Path(__file__).resolve().parents[2]
overs = pytest.mark.parametrize(
    "transport", [pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "ucx-put")], indirect=True
)
over_tcp = pytest.mark.parametrize("transport", [pytest.param("ucx", marks=pytest.mark.ucx)], indirect=True)


# Finding UCX


def test_without_ucx_a_comm_says_what_to_install_and_everything_else_works(tmp_path: Path) -> None:
    code = """
import sys, m2n
features = m2n.features()
assert not features["ucx"] and "ucx" not in features["transports"], features
assert "pip install 'm2n[ucx]'" in features["ucx_words"] and "/nowhere/libucp.so.0" in features["ucx_words"]
shape, placement = m2n.Shape(8, 2, 1, 4), m2n.Placement.block(2, 1)
try:
    m2n.ExpertComm(0, shape, placement, sys.argv[1], config=m2n.Config(transport="ucx"))
except m2n.SetupError as error:
    assert "pip install 'm2n[ucx]'" in str(error) and "Config(ucx_library=" in str(error)
else:
    raise AssertionError("no error")
m2n.ExpertComm(0, shape, placement, sys.argv[1]).close()
assert "libucp" not in open("/proc/self/maps").read()
"""
    environment = {**os.environ, "M2N_UCX_LIBRARY": "/nowhere/libucp.so.0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=60)


def test_a_library_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "libucp.so.0").write_bytes(b"no library")
    with pytest.raises(m2n.SetupError, match="libucp.so.0: file too short|invalid ELF"):
        _C.describe_transport(f"ucx;library={tmp_path}/libucp.so.0")
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    with pytest.raises(m2n.SetupError, match="has no ucp_get_version"):
        _C.describe_transport(f"ucx;library={libc}")


@pytest.mark.ucx
def test_importing_and_other_transports_load_no_ucx(tmp_path: Path) -> None:
    code = """
import sys, m2n
shape, placement = m2n.Shape(8, 2, 1, 4), m2n.Placement.block(2, 1)
with m2n.ExpertComm(0, shape, placement, sys.argv[1]), m2n.AttentionComm(0, shape, placement, sys.argv[1]):
    assert "libucp" not in open("/proc/self/maps").read()
assert m2n.features()["ucx"] and "libucp" in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize("changes, words", [
    ({"ucx_way": "mail"}, "ucx_way: expected one of auto, message, put"),
    ({"ucx_library": "a;b"}, "ucx_library"),
    ({"ucx_variables": {"tls": "tcp"}}, "ucx_variables"),
    ({"ucx_variables": {"TLS": "tcp;way=put"}}, "ucx_variables"),
])  # fmt: skip
def test_bad_settings_name_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        m2n.Config(**changes)


@pytest.mark.parametrize("name", ["ucxx", "ucx;", "ucx;way=x", "ucx;nothing", "ucx;tls=tcp"])
def test_bad_native_names_are_refused(name: str) -> None:
    with pytest.raises(m2n.SetupError, match="expected 'ucx'"):
        _C.describe_transport(name)


@pytest.mark.ucx
@pytest.mark.parametrize(
    "listed", ["tcp,self", "all", "rc,all", "posix,t*", "*", "\\tcp", "tcp:aux", "^sysv", "^posix,sysv"]
)
@pytest.mark.parametrize("where", ["settings", "environment"])
def test_a_list_of_transports_that_lets_tcp_in_is_refused(
    where: str, listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", listed if where == "environment" else "posix,self")
    config = m2n.Config(transport="ucx", ucx_variables={} if where == "environment" else {"TLS": listed})
    with pytest.raises(ValueError, match="lets TCP in, by which whoever reaches.*transport='tcp'.*insecure=True"):
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config)
    with contextlib.suppress(m2n.SetupError):  # not every UCX has all of these
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=dataclasses.replace(config, insecure=True)).close()


@pytest.mark.ucx
@pytest.mark.parametrize("listed", [None, "^tcp", "^sysv,tcp", "posix,sysv,self"])
def test_without_tcp_no_port_of_ucx_is_open(listed: str | None, tmp_path: Path) -> None:
    variables = {"TLS": listed} if listed else {}
    before = set(psutil.Process().net_connections("inet"))
    with m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=m2n.Config(transport="ucx", ucx_variables=variables)):
        opened = set(psutil.Process().net_connections("inet")) - before
        assert not [each for each in opened if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM]
    with m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=bodies.config_of("ucx")):
        assert set(psutil.Process().net_connections("inet")) - before  # there is something to be seen


@pytest.mark.ucx
def test_two_ranks_of_one_host_without_tcp_are_told_what_to_take(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shape": SMALL, "placement": ONE, "store": tmp_path}
    config = m2n.Config(transport="ucx", connect_timeout_s=8.0)
    try:
        with m2n.ExpertComm(0, config=config, **options), m2n.AttentionComm(0, config=config, **options):
            pass  # there is RDMA here
    except m2n.SetupError as error:
        assert "Without Config(insecure=True) UCX gets no TCP: transport='tcp' needs no UCX" in str(error)


@pytest.mark.ucx
def test_a_setting_that_ucx_refuses_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(bodies.config_of("ucx"), ucx_variables={"NO_SUCH_THING": "1"})
    with pytest.raises(m2n.SetupError, match="setting NO_SUCH_THING=1"):
        m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config)


@pytest.mark.ucx
@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("libucx") is None, reason="no headers of UCX (pip install libucx-cu12)")
def test_what_is_declared_of_ucx_is_what_its_headers_say(tmp_path: Path) -> None:
    (folder,) = importlib.util.find_spec("libucx").submodule_search_locations  # type: ignore[union-attr]
    command = [CXX, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{folder}/include"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/transport/ucx_headers.cc")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[:2000]


# What a peer can send


@pytest.mark.slow
@pytest.mark.ucx
@needs_compiler
def test_a_bad_message_breaks_its_link_in_words_and_strangers_are_not_heard(tmp_path: Path) -> None:
    program = tmp_path / "garbage"
    command = [
        CXX,
        "-std=c++20",
        f"-I{ROOT / 'csrc'}",
        "-DM2N_HAS_CUDA=0",
        str(ROOT / "tests/transport/ucx_garbage.cc"),
    ]
    library = build_libraries() / "libm2n_transport.a"
    subprocess.run([*command, str(library), "-o", str(program), "-ldl", "-lpthread"], check=True)
    ucx = re.sub(r"^UCX [\d.]+, ", "", m2n.features()["ucx_words"])
    environment = {**os.environ, "UCX_TLS": "tcp,self"}
    done = subprocess.run([str(program), ucx], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# What is refused


@pytest.mark.ucx
@pytest.mark.parametrize("transport, words", [("tcp,self", "tcp only emulates"), ("sysv,self", "sysv only emulates")])
def test_puts_are_refused_where_they_are_emulated(transport: str, words: str, tmp_path: Path) -> None:
    config = dataclasses.replace(bodies.config_of("ucx"), ucx_way="put", ucx_variables={"TLS": transport})
    options: dict[str, Any] = {"shape": SMALL, "placement": ONE, "store": tmp_path, "config": config}
    with m2n.ExpertComm(0, **options), pytest.raises(m2n.SetupError, match=words):
        m2n.AttentionComm(0, **options)


@over_tcp
def test_a_forked_child_is_told_to_be_spawned(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path) as server, small_attention(tmp_path) as comm:
        assert "start processes with 'spawn'" in fork(lambda: small_expert(tmp_path, name="child"))()
        expected = small_dispatch(comm)
        assert small_answer(server) and np.array_equal(comm.combine_recv(), expected)


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    for transport in ("tcp", "ucx"):
        config = m2n.Config(transport=transport, faults=m2n.Faults(delay_us=1))
        with pytest.raises(ValueError, match=f"over '{transport}' cannot be held back yet"):
            m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config)


@over_tcp
def test_both_sides_need_the_same_transport(transport: str, tmp_path: Path) -> None:
    with small_expert(tmp_path), pytest.raises(m2n.SetupError, match="uses the transport"):
        m2n.AttentionComm(0, SMALL, ONE, tmp_path, config=bodies.config_of("shm"))
