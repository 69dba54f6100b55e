# SPDX-License-Identifier: Apache-2.0
"""Ranks on several hosts, in network namespaces: exchanges equal the oracle, the model generates the same tokens, and
cut links, lost packets, slow links and stopped processes are told apart."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2n.benchmarks.harness.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]
RANK = ROOT / "tests/support/host_rank.py"
SOON_S = 90.0

pytestmark = [pytest.mark.two_hosts, pytest.mark.slow, pytest.mark.timeout(240)]


class Ranks:
    """Programs of tests/support/host_rank.py, and a store that the first host serves."""

    def __init__(self, hosts: Hosts, attention: list[int], experts: list[int], **env: str) -> None:
        self.hosts, self.env, self.counts = hosts, env, (len(attention), len(experts))
        self.url = f"tcp://{hosts.address(attention[0])}:4779"
        self.store = hosts.python(attention[0], "-m", "m2n", "store", self.url)
        wait_line(self.store, "")
        self.experts = [self.start("expert", rank, host) for rank, host in enumerate(experts)]
        self.attention: list[subprocess.Popen[str]] = []

    def start(self, role: str, rank: int, host: int, seconds: float = 0, pids: bool = False, **env: str) -> Any:
        counts = map(str, self.counts)
        return self.hosts.python(host, RANK, role, rank, *counts, self.url, seconds, pids=pids, **{**self.env, **env})


def wait_line(process: subprocess.Popen[str], begin: str) -> str:
    """The next line that begins so. The test's own deadline ends this wait."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(begin):
            return line
    raise AssertionError(f"no line {begin!r}: {''.join(said)[-2000:]}")


def rest_of(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=SOON_S)
    return said


@contextlib.contextmanager
def running(num_hosts: int, attention: list[int], experts: list[int], **env: str) -> Iterator[Ranks]:
    with Hosts(num_hosts) as hosts:
        yield Ranks(hosts, attention, experts, **env)


LAUNCHES = {"TEST_DEVICE": "emulated", "M2N_TRANSPORT": "tcp"}
# UCX over TCP, beside a key that is still asked for.
OVER_UCX = {"M2N_TRANSPORT": "ucx", "M2N_INSECURE": "1", "UCX_TLS": "tcp,self"}


@pytest.mark.parametrize(
    ("attention", "experts", "env"),
    [
        ([0, 0], [1, 2], {}),
        pytest.param([0, 1], [0, 1], {}, marks=pytest.mark.essential),
        ([0, 1], [0, 1], LAUNCHES),
        pytest.param([0, 0], [1, 2], OVER_UCX, marks=pytest.mark.ucx),
    ],
    ids=["two attention ranks here, experts there", "both roles on both hosts", "verbs are launched", "over UCX"],
)
def test_exchanges_between_hosts_equal_the_oracle(
    attention: list[int], experts: list[int], env: dict[str, str]
) -> None:
    with running(max(*attention, *experts) + 1, attention, experts, **env) as ranks:
        started = [ranks.start("attention", rank, host, seconds=3) for rank, host in enumerate(attention)]
        for process in (*started, *ranks.experts):
            said = rest_of(process)
            assert process.returncode == 0 and said.endswith("done\n"), said
        assert "clocks {" in said


def test_pods_of_one_host_without_common_process_numbers_meet() -> None:
    with running(2, [0], [1]) as ranks:
        process = ranks.start("attention", 0, 0, pids=True)
        said = rest_of(process)
        assert process.returncode == 0 and said.endswith("done\n"), said


def test_a_cut_link_is_peer_lost_on_both_sides_within_three_periods_and_ranks_come_back() -> None:
    period_s = 0.5
    with running(3, [0, 2], [1], TEST_HEARTBEAT_S=str(period_s)) as ranks:
        (server,) = ranks.experts
        first, second = (ranks.start("attention", rank, host, seconds=60) for rank, host in enumerate((0, 2)))
        for process in (first, second):
            wait_line(process, "right")
        cut_at = time.time()
        ranks.hosts.cut(2)
        for line in (wait_line(second, "PeerLost"), wait_line(server, "PeerLost")):
            noticed_s = float(line.split()[1]) - cut_at
            assert "three heartbeats" in line and noticed_s < 3 * period_s + 1.0, line  # 1 s: busy cores
        wait_line(first, "right")  # the others go on
        ranks.hosts.mend(2)
        again = ranks.start("attention", 1, 2)  # a new life
        said = rest_of(again)
        assert again.returncode == 0 and said.endswith("done\n"), said
        wait_line(first, "right")


def test_lost_packets_change_no_bit() -> None:
    with running(2, [0], [1]) as ranks:
        try:
            for host in (0, 1):
                ranks.hosts.lose(host, 0.01)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"packets cannot be lost here (iptables with the statistic match): {error}")
        process = ranks.start("attention", 0, 0, seconds=5)
        said = rest_of(process)
        assert process.returncode == 0 and said.endswith("done\n"), said


def test_slow_and_stopped_for_a_while_is_alive() -> None:
    """A link that m2n's own traffic fills, and a process that is stopped for less than three periods."""
    with running(2, [0], [1]) as ranks:
        ranks.hosts.shape(0, mbit=20)
        process = ranks.start("attention", 0, 0, seconds=12)
        wait_line(process, "right")
        (server,) = ranks.experts
        os.killpg(server.pid, signal.SIGSTOP)
        time.sleep(2.0)  # of three periods of 1 s
        os.killpg(server.pid, signal.SIGCONT)
        said = rest_of(process)
        assert process.returncode == 0 and "Lost" not in said and said.endswith("done\n"), said


def test_diagnose_says_what_reaches_between_two_hosts() -> None:
    with Hosts(2) as hosts:
        url = f"tcp://{hosts.address(0)}:4779"
        store = hosts.python(0, "-m", "m2n", "store", url)
        wait_line(store, "m2n: store at")
        expert = hosts.python(1, "-m", "m2n", "diagnose", "--role", "expert", "--store", url)
        attention = hosts.python(0, "-m", "m2n", "diagnose", "--role", "attention", "--store", url)
        said = rest_of(attention)
        assert attention.returncode == 0, said
        assert re.search(r"^shm  no: .*which reaches only its own", said, re.MULTILINE), said
        assert re.search(r"^tcp  yes: [\d.]+ us one way for 1 KB, [\d.]+ GB/s", said, re.MULTILINE), said
        assert "no RDMA device" in said and "M2N_BIND is not set" not in said
        assert "yes" not in rest_of(expert) and expert.returncode == 0


def model_tokens(text: str) -> list[list[int]]:
    return [sequence["token_ids"] for sequence in json.loads(text)["sequences"]]


MODEL = ["-m", "m2n.reference_model", "--attention-ranks", "2", "--expert-ranks", "2", "--microbatches", "2",
         "--max-new-tokens", "8", "--prompt", "And it came to pass", "--prompt", "In the beginning"]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of one process."""
    path = tmp_path_factory.mktemp("here") / "out.json"
    subprocess.run(
        [sys.executable, *MODEL, "--one-process", "--json", path], check=True, capture_output=True, timeout=200
    )
    return model_tokens(path.read_text())


@pytest.mark.parametrize("launched", ["plain commands", "torchrun", "plain commands, verbs too"])
def test_the_model_generates_the_same_tokens_across_hosts(
    launched: str, expected: list[list[int]], tmp_path: Path
) -> None:
    """Attention on one host, an expert rank on each of two others."""
    path = tmp_path / "out.json"
    with Hosts(3) as hosts:
        master = {"MASTER_ADDR": hosts.address(0), "MASTER_PORT": "4781"}
        commands = [*MODEL, "--json", path]
        if launched.endswith("verbs too"):
            master["M2N_TRANSPORT"] = "tcp"
            commands += ["--attention-device", "emulated"]
        if launched == "torchrun":
            # A node each: torchrun wants as many processes on all of them, or says how many in turn.
            processes = [
                hosts.python(
                    host, "-m", "torch.distributed.run", "--nnodes", 3, "--node-rank", host, "--nproc-per-node", count,
                    "--master-addr", master["MASTER_ADDR"], "--master-port", master["MASTER_PORT"], *commands,
                )
                for host, count in enumerate((2, 1, 1))
            ]  # fmt: skip
        else:
            places = {0: 0, 1: 0, 2: 1, 3: 2}
            processes = [
                hosts.python(host, *commands, RANK=str(rank), WORLD_SIZE="4", **master) for rank, host in places.items()
            ]
        said = [rest_of(process) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), said
    assert model_tokens(path.read_text()) == expected
