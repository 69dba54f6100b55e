# SPDX-License-Identifier: Apache-2.0
"""Hosts in the small: network namespaces on one bridge, each with an address, whose links can be cut, slowed and made
to lose packets. They share nothing but files: no abstract sockets, no loopback; and with `pids` no process numbers."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KEY = "the key of a test's job"
_numbers = itertools.count()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


@functools.cache
def why_no_hosts() -> str | None:
    """Why there can be no such hosts here; None when there can."""
    if shutil.which("ip") is None:
        return "no ip (apt-get install -y iproute2)"
    try:
        with Hosts(1):
            pass
    except (subprocess.CalledProcessError, OSError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces cannot be made here (root in a container with CAP_NET_ADMIN can): {said[:100]}"
    return None


class Hosts:
    """`count` hosts, numbered from 0, at 10.79.0.(number + 1)."""

    def __init__(self, count: int) -> None:
        self.count, self._processes = count, list[subprocess.Popen[str]]()
        # Names of interfaces have at most 15 characters.
        self._name = f"m2n{os.getpid() % 10000:x}{next(_numbers):x}{secrets.token_hex(1)}"
        self._namespaces: list[str] = []

    def __enter__(self) -> Hosts:
        try:
            self._make(f"{self._name}sw")
            switch = self._namespaces[0]
            _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "br0", "up")
            for host in range(self.count):
                self._make(f"{self._name}h{host}")
                here = ["ip", "-n", self._namespaces[-1]]
                _run(*here, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{host}", "netns", switch)
                _run("ip", "-n", switch, "link", "set", f"port{host}", "master", "br0", "up")
                _run(*here, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                _run(*here, "link", "set", "lo", "up")
                _run(*here, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self._namespaces:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)

    def address(self, host: int) -> str:
        return f"10.79.0.{host + 1}"

    def start(self, host: int, command: Sequence[str | Path], pids: bool = False, **env: str) -> subprocess.Popen[str]:
        """Starts a process there; `pids`: in a namespace of process numbers of its own, as pods are."""
        prefix = ["ip", "netns", "exec", self._namespaces[host + 1]]
        if pids:
            prefix += ["unshare", "--pid", "--fork", "--mount-proc"]
        settings = {"M2N_BIND": "eth0", "M2N_JOB_KEY": _KEY, "UCX_TLS": "tcp,self", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*prefix, *map(str, command)], env={**os.environ, **settings, **env}, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def python(self, host: int, *arguments: Any, pids: bool = False, **env: str) -> subprocess.Popen[str]:
        return self.start(host, [sys.executable, *map(str, arguments)], pids, **env)

    def cut(self, host: int) -> None:
        """The switch's end: the host itself sees nothing but silence."""
        _run("ip", "-n", self._namespaces[0], "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        _run("ip", "-n", self._namespaces[0], "link", "set", f"port{host}", "master", "br0", "up")

    def shape(self, host: int, mbit: float) -> None:
        """At most so fast, in each direction."""
        for namespace, device in ((self._namespaces[host + 1], "eth0"), (self._namespaces[0], f"port{host}")):
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{mbit}mbit",
                 "burst", "256kb", "latency", "50ms")  # fmt: skip

    def lose(self, host: int, share: float) -> None:
        """Loses packets that come in, at random."""
        _run("ip", "netns", "exec", self._namespaces[host + 1], "iptables", "-A", "INPUT", "-i", "eth0", "-m",
             "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")  # fmt: skip
