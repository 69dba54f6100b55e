# SPDX-License-Identifier: Apache-2.0
"""Hosts in the small: network namespaces on one bridge, each with an address, whose links can be cut, slowed, made long
and made to lose packets. They share nothing but files: no abstract sockets, no loopback; and with `pids` no process
numbers. For tests and benchmarks; needs root."""

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
from typing import Any, NamedTuple

from .links import Link
from .runs import program

_KEY = secrets.token_hex(16)
# Of a long cable: a message of 64 KB is one packet, so that the relay keeps up with fast links.
_LONG_MTU = 65500
_numbers = itertools.count()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


@functools.cache
def why_no_hosts() -> str | None:
    """Why there can be no such hosts here; None when there can."""
    return _why_not(Hosts(1), "network namespaces cannot be made here (root in a container with CAP_NET_ADMIN can)")


def why_no_links() -> str | None:
    """Why there can be no hosts with a long cable here; None when there can."""
    return why_no_hosts() or _why_not(Hosts(1, Link(1000, 0)), "the relay of a long cable does not run here")


def _why_not(hosts: Hosts, words: str) -> str | None:
    if shutil.which("ip") is None:
        return "no ip (apt-get install -y iproute2)"
    try:
        with hosts:
            pass
    except (subprocess.CalledProcessError, OSError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"{words}: {said[:100]}"
    return None


class Place(NamedTuple):
    """What makes a command run on a host."""

    prefix: tuple[str, ...]
    env: dict[str, str]


class Hosts:
    """`count` hosts, numbered from 0, at 10.79.0.(number + 1). link: the cable of host 0; the others are short."""

    def __init__(self, count: int, link: Link | None = None) -> None:
        self.count, self.link, self._processes = count, link, list[subprocess.Popen[str]]()
        self.relay: subprocess.Popen[str] | None = None
        # Names of interfaces have at most 15 characters.
        self._name = f"m2n{os.getpid() % 10000:x}{next(_numbers):x}{secrets.token_hex(1)}"
        self.namespaces: list[str] = []

    def __enter__(self) -> Hosts:
        try:
            self._make(f"{self._name}sw")
            switch = self.namespaces[0]
            _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "br0", "up")
            for host in range(self.count):
                self._make(f"{self._name}h{host}")
                here = ["ip", "-n", self.namespaces[-1]]
                if self.link is not None and host == 0:
                    self._lay_long_cable(self.link)
                else:
                    _run(*here, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{host}", "netns", switch)
                mtu = [] if self.link is None else ["mtu", str(_LONG_MTU)]
                _run("ip", "-n", switch, "link", "set", f"port{host}", *mtu, "master", "br0", "up")
                _run(*here, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                _run(*here, "link", "set", "lo", "up")
                _run(*here, "link", "set", "eth0", *mtu, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.namespaces:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self.namespaces.append(name)

    def _lay_long_cable(self, link: Link) -> None:
        """Host 0's eth0 and its port at the switch are two devices that a program reads and writes.

        The program also limits the rate: tbf lets a burst pass at once, which must be as large as the largest packet,
        so with few large packets a message that comes alone would not be slowed at all.
        """
        ends = ((self.namespaces[1], "eth0"), (self.namespaces[0], "port0"))
        for namespace, device in ends:
            _run("ip", "-n", namespace, "tuntap", "add", "dev", device, "mode", "tap")
        command = [program("m2n_relay"), link.mbit, link.delay_us, *itertools.chain(*ends)]
        # It ends with its standard input: also where this process is killed.
        self.relay = subprocess.Popen(
            list(map(str, command)), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes.append(self.relay)
        said = []
        assert self.relay.stdout is not None
        for line in self.relay.stdout:
            if line == "ready\n":
                sys.stderr.writelines(said)
                return
            said.append(line)
        raise OSError("".join(said).strip())

    @property
    def relay_cpu_s(self) -> float:
        """Seconds of a core that the program of the long cable has taken."""
        assert self.relay is not None
        return int(Path(f"/proc/{self.relay.pid}/schedstat").read_text().split()[0]) / 1e9

    def address(self, host: int) -> str:
        return f"10.79.0.{host + 1}"

    def place(self, host: int) -> Place:
        """What makes a command run there, and its peers reach it."""
        settings = {"M2N_BIND": "eth0", "M2N_JOB_KEY": _KEY, "OMP_NUM_THREADS": "1"}
        return Place(("ip", "netns", "exec", self.namespaces[host + 1]), settings)

    def start(self, host: int, command: Sequence[str | Path], pids: bool = False, **env: str) -> subprocess.Popen[str]:
        """Starts a process there; `pids`: in a namespace of process numbers of its own, as pods are."""
        prefix, settings = self.place(host)
        if pids:
            prefix += ("unshare", "--pid", "--fork", "--mount-proc")
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
        _run("ip", "-n", self.namespaces[0], "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        _run("ip", "-n", self.namespaces[0], "link", "set", f"port{host}", "master", "br0", "up")

    def shape(self, host: int, mbit: float) -> None:
        """At most so fast, in each direction."""
        for namespace, device in ((self.namespaces[host + 1], "eth0"), (self.namespaces[0], f"port{host}")):
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{mbit}mbit",
                 "burst", "256kb", "latency", "50ms")  # fmt: skip

    def lose(self, host: int, share: float) -> None:
        """Loses packets that come in, at random."""
        _run("ip", "netns", "exec", self.namespaces[host + 1], "iptables", "-A", "INPUT", "-i", "eth0", "-m",
             "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")  # fmt: skip
