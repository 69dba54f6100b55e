# SPDX-License-Identifier: Apache-2.0
"""m2n-bench pingpong --links: a tiny run of it over one link, the link itself, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

from m2n.benchmarks import cli
from m2n.benchmarks.harness import hosts, link_probe
from m2n.benchmarks.harness.links import DEFAULT_LINKS, Link, parse_links  # noqa: E402
from m2n.benchmarks.harness.pool import Pool  # noqa: E402
from m2n.benchmarks.pipeline.pingpong import links as pingpong_links  # noqa: E402

MICROBATCHES = [1, 2, 3, 4]
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def test_links_are_read_and_named() -> None:
    assert parse_links("1gbit:0.1ms, 250mbit:20us") == [Link(1000, 100), Link(250, 20)]
    assert [link.name for link in parse_links(DEFAULT_LINKS)] == DEFAULT_LINKS.split(",")
    # 48 KB at 1 Gbit/s are 393 us, and then the delay.
    assert Link(1000, 100).message_ms(49152) == pytest.approx(0.493, abs=1e-3)


@needs_two_cores
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--links 1gbit", "--links: expected RATE:DELAY in mbit or gbit and, one way, us or ms, as in 1gbit:0.1ms"),
        ("--links 1gbit:1ms,2gbit:3s", "got '2gbit:3s'"),
        ("--links 0gbit:1ms", "--links: expected a rate from 10mbit to 100gbit, got '0gbit:1ms'"),
        ("--links 1gbit:101ms", "--links: expected a delay of at most 100ms, got '1gbit:101ms'"),
        ("--links --plot x.png", "--links: draws no pictures and writes no trace"),
        ("--links --json /nowhere/out.json", "/nowhere/out.json"),
        ("--links", "--links: there are no namespaces"),
    ],
)
def test_bad_links_are_refused_before_any_process_starts(
    options: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "__init__", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(pingpong_links, "why_no_links", lambda: "there are no namespaces")
    assert cli.main(["pingpong", *shlex.split(options)]) == 2
    assert expected in capsys.readouterr().err


def test_the_probe_measures_plain_sockets() -> None:
    rates: list[float] = []
    far = threading.Thread(target=lambda: rates.append(link_probe.answer({}, "127.0.0.1", 4096)))
    far.start()
    near = link_probe.ask({}, "127.0.0.1", 4096, bulk_s=0.2)
    far.join()
    assert near["round_trip_ms"] > 0 and rates[0] > 0


# A program with a long cable, which is then killed: nothing of it can be cleaned up by itself.
ORPHAN = """if True:
    import time
    from m2n.benchmarks.harness.hosts import Hosts
    from m2n.benchmarks.harness.links import Link
    with Hosts(1, Link(1000, 1000)) as hosts:
        print(hosts.relay.pid, *hosts.namespaces, flush=True)
        time.sleep(60)
"""


@pytest.fixture
def _with_links() -> None:
    if reason := hosts.why_no_links():
        pytest.skip(reason)


@pytest.mark.two_hosts
@pytest.mark.usefixtures("_with_links")
def test_the_relay_of_a_killed_program_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        relay, *namespaces = process.stdout.readline().split()
        try:
            assert Path(f"/proc/{relay}/comm").read_text() == "m2n_relay\n"
            process.send_signal(signal.SIGKILL)
            process.wait()
            until = time.monotonic() + 10
            while is_running(int(relay)) and time.monotonic() < until:
                time.sleep(0.02)
            assert not is_running(int(relay))
        finally:
            process.kill()
            for name in namespaces:
                subprocess.run(["ip", "netns", "del", name], check=True)


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(tmp_path: Path, *options: Any) -> dict[str, Any]:
    words = shlex.split("pingpong --rounds 1 --steps 5 --sequences 2 --hidden 32 --layers 2 --least-tf-ms 0")
    assert cli.main([*words, *map(str, options), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.two_hosts
@pytest.mark.usefixtures("_with_links")
@needs_two_cores
def test_a_tiny_run_over_one_link_shows_its_delay_and_leaves_nothing(tmp_path: Path) -> None:
    about = run(tmp_path, "--links", "100mbit:3ms")
    assert about["machine"]["cores"] and about["command"].startswith("m2n-bench pingpong --rounds 1")
    (link,), rows = about["links"], about["rows"]
    assert (link["link"], link["rate_gbit"], link["delay_ms"]) == ("0.1gbit:3ms", 0.1, 3)
    # No packet is faster than the link, so these hold on any machine.
    assert link["tcp_round_trip_ms"] >= 2 * 3
    assert 0 < link["tcp_bulk_gbit"] < 2 * 0.1 and link["t_c_ms"] > 0 and 0 < link["relay_share"] < 1
    assert [row["microbatches"] for row in rows] == MICROBATCHES
    for row in rows:
        # A token goes through two layers, there and back.
        assert row["between_tokens_p50_ms"] >= 2 * 2 * 3
        assert all(row[name] > 0 for name in ("tokens_per_s", "simulated_tokens_per_s", "gain", "t_a_ms", "t_e_ms"))
        assert row["gain_min_max"][0] <= row["gain"] <= row["gain_min_max"][1]
        assert row["simulated_gain"] > 0 and row["from_traces_gain"] > 0
    assert rows[0]["gain"] == rows[0]["simulated_gain"] == 1
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"m2n{os.getpid() % 10000:x}")]
