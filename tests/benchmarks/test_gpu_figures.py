# SPDX-License-Identifier: Apache-2.0
"""The paper's figures on one GPU (benchmarks/gpu/figures.py), where there is none: their rows, and that wrong ones are
seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from m2n.benchmarks.gpu.copies import CopyExchange, Streams  # noqa: E402
from m2n.benchmarks.gpu.figures import Case, Exchange, Timer, numbers_of  # noqa: E402

COMMAND = [sys.executable, "-m", "m2n.benchmarks.gpu.figures", "--device", "emulated", "--quick"]
KB = 1024


def make_case(store: Path, m: int = 2, n: int = 2, pair_bytes: int = 16 * KB) -> Case:
    exchange = Exchange(str(store), m, n, pair_bytes, "emulated", Streams(m + n, "cpu"), num_sms=1)
    return Case(exchange, Timer("cpu"))


def test_the_quick_run_prints_three_contenders_for_each_case() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    cases = [(11, 2, 2, KB), (11, 2, 2, 16 * KB), (12, 1, 2, 256 * KB), (12, 2, 1, 256 * KB)]
    assert [(row["figure"], row["m"], row["n"], row["pair_bytes"]) for row in rows[::3]] == cases
    assert [row["contender"] for row in rows] == ["limit", "copies", "m2n"] * len(cases)
    for limit, *others in zip(*(rows[i::3] for i in range(3))):
        assert limit["bytes"] == limit["m"] * limit["n"] * limit["pair_bytes"] and "ratio" not in limit
        for row in (limit, *others):
            assert "emulated" in row["name"] and row["samples"] == 5 and 0 < row["p50_us"] <= row["p99_us"]
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3, abs=1e-3, rel=1e-3)
        assert all(row["limit_us"] == pytest.approx(limit["p50_us"], abs=1e-3) for row in others)


def test_what_is_out_of_time_or_impossible_is_named_and_fails() -> None:
    done = subprocess.run([*COMMAND, "--deadline", "-1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout.count("not run: -1 s are over") == 4 and "{" not in done.stdout
    with pytest.raises(ValueError, match="2x3: N is a power of two"):
        Exchange("", 2, 3, KB, "emulated", Streams(5, "cpu"), 1)
    assert numbers_of("4x16") == (4, 16)


@pytest.mark.parametrize("m, n, pair_bytes", [(3, 2, KB), (1, 4, 24 * KB)])
def test_every_row_arrives_and_comes_back(tmp_path: Path, m: int, n: int, pair_bytes: int) -> None:
    case = make_case(tmp_path, m, n, pair_bytes)
    samples = case.measure(rounds=2, seconds=60)
    assert {name: len(each) for name, each in samples.items()} == {"m2n": 2, "copies": 2, "limit": 2}
    sent = torch.cat(case.exchange.xs)
    assert len(sent) == m * case.exchange.num_tokens
    assert all(torch.equal(got, sent) for got in case.exchange.got)
    case.exchange.close()


def after_answer(case: Case, spoil: Callable[[], object]) -> None:
    answer = case.answer
    case.answer = lambda: (answer(), spoil())


def lose_a_row(case: Case) -> None:
    after_answer(case, lambda: case.exchange.got[1][-1].zero_())


def lose_a_reply(case: Case) -> None:
    after_answer(case, lambda: case.exchange.results[0][-1].zero_())


def lose_the_copies(case: Case) -> None:
    case.works["copies"] = lambda: None


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lose_a_row, "an expert rank did not get the rows"),
        (lose_a_reply, "that came back are not"),
        (lose_the_copies, "a window does not hold"),
    ],
)
def test_wrong_rows_are_seen(tmp_path: Path, spoil: Callable[[Case], None], words: str) -> None:
    case = make_case(tmp_path)
    spoil(case)
    with pytest.raises(RuntimeError, match=words):
        case.measure(rounds=1, seconds=60)
    case.exchange.close()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[mock.Mock]:
    """torch's streams and events in name only, with the arguments they take; the streams that were made."""
    made: list[mock.Mock] = []
    stream_type, event_type = torch.cuda.Stream, torch.cuda.Event

    def make_stream(*_: object) -> mock.Mock:
        made.append(mock.create_autospec(stream_type, instance=True))
        return made[-1]

    def make_event(**_: bool) -> mock.Mock:
        event = mock.create_autospec(event_type, instance=True)
        event.elapsed_time.return_value = 0.25
        return event

    here = make_stream()
    for name, fake in (("Stream", make_stream), ("Event", make_event), ("current_stream", lambda: here)):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    return made


def test_on_a_gpu_streams_are_forked_signalled_and_joined(cuda: list[mock.Mock]) -> None:
    streams = Streams(2, "cuda:0")
    here, sender, receiver = cuda
    streams.fork()
    streams.signal(0, 1)
    streams.join()
    (event,) = receiver.wait_event.call_args.args
    event.record.assert_called_once_with(sender)
    assert sender.method_calls == [mock.call.wait_stream(here)]
    assert receiver.method_calls == [mock.call.wait_stream(here), mock.call.wait_event(event)]
    assert here.method_calls == [mock.call.wait_stream(sender), mock.call.wait_stream(receiver)]
    with pytest.raises(ValueError, match="31 ranks: torch has streams for 30"):
        Streams(31, "cuda")


def test_on_a_gpu_what_takes_turns_is_enqueued_behind_a_sleep_and_timed_by_events(cuda: list[mock.Mock]) -> None:
    timer, order = Timer("cuda:0"), []
    torch.cuda._sleep.side_effect = lambda cycles: order.append("sleep")
    torch.cuda.synchronize.side_effect = lambda: order.append("synchronize")
    timer.begin_round()
    timer.run("a", lambda: order.append("a"))
    timer.run("b", lambda: order.append("b"))
    assert timer.end_round() == {"a": 250.0, "b": 250.0}
    assert order == ["sleep", "a", "b", "synchronize"]


class Recorder(Streams):
    """Notes which stream is to wait for which."""

    def __init__(self, count: int) -> None:
        super().__init__(count, "cpu")
        self.signals: list[tuple[int, int]] = []

    def signal(self, sender: int, receiver: int) -> None:
        self.signals.append((sender, receiver))


def test_copies_go_there_and_back_with_an_event_for_each_pair() -> None:
    streams = Recorder(5)
    sources = [[torch.full((r + k, 4), float(10 * r + k)) for k in range(3)] for r in range(2)]
    exchange = CopyExchange(sources, streams)
    exchange.round_trip()
    there = [(r, 2 + k) for r in range(2) for k in range(3)]
    assert streams.signals == there + [(k, r) for k in range(2, 5) for r in range(2)]
    for rows, replies in zip(sources, exchange.replies):
        assert all(torch.equal(row, reply) for row, reply in zip(rows, replies))
