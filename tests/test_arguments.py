# SPDX-License-Identifier: Apache-2.0
"""Arguments and environment: read-only outputs, IPv6, words of the environment, wrong types by their field, and what a
host program has set for its own arithmetic."""

from __future__ import annotations

import ctypes
import mmap
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import NUMPY, ONE, SMALL, small_attention, small_dispatch, small_expert

import m2n
from m2n import interfaces
from m2n.checks import flag_of
from m2n.deadline import Deadline
from m2n.store import first_line, open_store

KEY = "0123456789abcdef0123456789abcdef"


class Raises:
    """A tensor of somebody's own whose export fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise self.error


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[m2n.AttentionComm, m2n.ExpertComm]]:
    with small_expert(tmp_path) as expert, small_attention(tmp_path) as attention:
        yield attention, expert


def answer(expert: m2n.ExpertComm) -> None:
    batch = expert.dispatch_recv()
    assert batch is not None
    expert.combine_send(batch, batch.gather())


# ---- 17: outputs


@pytest.mark.parametrize("kind", ["bytes", "flag", "mapped file", "view"])
def test_a_read_only_output_is_refused_by_name(
    kind: str, pair: tuple[m2n.AttentionComm, m2n.ExpertComm], tmp_path: Path
) -> None:
    attention, expert = pair
    small_dispatch(attention)
    answer(expert)
    num_tokens, num_bytes = 3, 3 * SMALL.hidden * 4
    kept = bytes(num_bytes)
    if kind == "mapped file":
        (tmp_path / "file").write_bytes(kept)
        with (tmp_path / "file").open("rb") as file:
            kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # type: ignore[assignment]
    out = np.frombuffer(kept, np.float32).reshape(num_tokens, SMALL.hidden)
    if kind in ("flag", "view"):
        out = np.zeros_like(out)
        out.flags.writeable = False
        out = out[:, :] if kind == "view" else out
    with pytest.raises((TypeError, ValueError), match="^out: .*read-?only"):
        attention.combine_recv(out=out)
    assert not np.asarray(out).any()
    assert attention.combine_recv().any(), "the batch is still there"


def test_gather_refuses_by_name_what_it_cannot_fill(pair: tuple[m2n.AttentionComm, m2n.ExpertComm]) -> None:
    attention, expert = pair
    small_dispatch(attention)
    batch = expert.dispatch_recv()
    assert batch is not None
    rows = batch.gather()
    for out in (np.frombuffer(bytes(rows.nbytes), np.float32).reshape(rows.shape), np.empty((1, 2), np.float32)):
        with pytest.raises(ValueError, match=r"^out: expected a tensor of shape \[\d+, 64\] that can be written"):
            batch.gather(out=out)
    given = np.empty_like(rows)
    assert batch.gather(out=given) is given and (given == rows).all()


def test_what_is_only_read_may_be_read_only(pair: tuple[m2n.AttentionComm, m2n.ExpertComm]) -> None:
    attention, expert = pair
    x = np.ones((2, SMALL.hidden), np.float32)
    x.flags.writeable = False
    attention.dispatch_send(x, attention.route(np.array([[0, 1], [2, 3]]), np.full((2, 2), 0.5, np.float32)))
    batch = expert.dispatch_recv()
    assert batch is not None
    y = batch.gather()
    y.flags.writeable = False
    expert.combine_send(batch, y)
    assert (attention.combine_recv() == 1).all()


@pytest.mark.parametrize(
    "error", [BufferError("no"), TypeError("bad"), RuntimeError("worse"), ValueError(""), KeyError("k")], ids=repr
)
def test_an_export_that_fails_is_told_with_the_argument(
    error: Exception, pair: tuple[m2n.AttentionComm, m2n.ExpertComm]
) -> None:
    attention, _ = pair
    route = attention.route(np.array([[0, 1]]), np.full((1, 2), 0.5, np.float32))
    with pytest.raises(TypeError, match="^x: cannot be read through DLPack: " + type(error).__name__):
        attention.dispatch_send(Raises(error), route)
    with pytest.raises(TypeError, match="^topk_ids: cannot be read through DLPack"):
        attention.route(Raises(error), np.full((1, 2), 0.5, np.float32))


# ---- 18: IPv6

has_ipv6 = pytest.mark.skipif(
    "::1" not in [address for own in interfaces.addresses().values() for address in own], reason="no IPv6 here"
)


@has_ipv6
def test_a_store_of_ipv6_has_a_usable_address() -> None:
    pytest.importorskip("torch")
    with m2n.host_store("tcp://[::1]:0") as store:
        assert re.fullmatch(r"tcp://\[::1\]:\d+", store.url)
        reached = open_store(store.url, Deadline(5.0), 2.0)
        reached.set("key", "value")
        assert bytes(reached.get("key")) == b"value"


IF_INET6 = (
    "fd010000000000000000000000000005 02 40 00 80     eth7\n"
    "fe8000000000000000000000000000aa 02 40 20 80     eth7\n"
    "00000000000000000000000000000001 01 80 10 80       lo\n"
)


def test_an_interface_or_network_of_ipv6_alone_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: IF_INET6 if str(self) == "/proc/net/if_inet6" else read(self, *a, **k)
    )
    assert interfaces.addresses()["eth7"] == ["fd01::5"], "that of a link names no interface"
    assert interfaces.addresses()["lo"] == ["127.0.0.1", "::1"]
    assert interfaces.resolve_bind("eth7") == interfaces.resolve_bind("fd01::/64") == ("fd01::5", 0)
    assert interfaces.resolve_bind("eth7:80") == interfaces.resolve_bind("[fd01::/64]:80") == ("fd01::5", 80)
    assert interfaces.resolve_bind("lo") == ("127.0.0.1", 0)
    with pytest.raises(m2n.SetupError, match=r"in the network fd02::/64; this host has .*eth7 \(fd01::5\)"):
        interfaces.resolve_bind("fd02::/64")


@has_ipv6
def test_ranks_exchange_over_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were on two hosts: the attention rank takes the network's address."""
    config = m2n.Config(bind="[::1]", job_key=KEY, arrays="numpy", transport="auto")
    with m2n.ExpertComm(0, SMALL, ONE, tmp_path, config=config) as expert:
        monkeypatch.setattr(m2n.bootstrap, "host_name", lambda: "another")
        with m2n.AttentionComm(0, SMALL, ONE, tmp_path, config=m2n.Config(job_key=KEY, arrays="numpy")) as attention:
            x = small_dispatch(attention)
            answer(expert)
            y = attention.combine_recv()
            (peer,) = attention.peers()
    assert y.shape == x.shape and peer.state == "live"


# ---- 19: words and types


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "Yes", " on "])
def test_the_usual_words_of_the_environment_are_true(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2N_INSECURE", word)
    monkeypatch.setenv("M2N_STREAM_WAITS", word)
    assert m2n.Config().insecure and m2n.Config().stream_waits
    assert not any(flag_of("X", text) for text in (None, "", "0", "false", "No", "OFF"))


@pytest.mark.parametrize("variable", ["M2N_INSECURE", "M2N_STREAM_WAITS"])
@pytest.mark.parametrize("word", ["maybe", "2", "tru", "-1"])
def test_another_word_is_refused_by_its_variable(variable: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, word)
    with pytest.raises(
        ValueError, match=rf"^{variable}: expected 1, true, yes, on, or 0, false, no, off, got '{word}'$"
    ):
        m2n.Config()


WRONG = {
    "job": 5, "timeout_s": "1", "connect_timeout_s": None, "store_timeout_s": [1], "bind": 5, "job_key": 7,
    "insecure": "yes", "heartbeat_s": "1", "give_up_s": "1", "transport": 3, "arrays": [], "num_sms": "64",
    "stream_waits": 1, "faults": "slow", "ucx_library": 5, "ucx_way": None, "ucx_variables": ["TLS"], "gpu_direct": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_type_names_its_field(field: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{field}: expected"):
        m2n.Config(**{field: WRONG[field]})


def test_every_field_of_a_config_is_tried() -> None:
    assert set(WRONG) == set(m2n.Config.__dataclass_fields__)


@pytest.mark.parametrize("field", ["hidden", "num_experts", "top_k", "max_tokens", "microbatches", "dispatch_dtype"])
@pytest.mark.parametrize("value", ["8", None, 1.5, []], ids=repr)
def test_a_wrong_type_names_its_field_of_a_shape(field: str, value: Any) -> None:
    fields = {"hidden": 8, "num_experts": 4, "top_k": 2, "max_tokens": 8, field: value}
    with pytest.raises((TypeError, ValueError), match=f"^{field}: "):
        m2n.Shape(**fields)


@pytest.mark.parametrize("timeout", ["x", float("nan"), -1, True, [1]], ids=repr)
def test_a_wrong_timeout_is_told_by_its_name(timeout: Any, pair: tuple[m2n.AttentionComm, m2n.ExpertComm]) -> None:
    attention, expert = pair
    small_dispatch(attention)
    calls = [
        lambda: attention.combine_recv(timeout=timeout),
        lambda: attention.wait_ready([0], timeout=timeout),
        lambda: attention.set_timeout(timeout),
        lambda: attention.set_placement(ONE, timeout=timeout),
        lambda: expert.dispatch_recv(timeout=timeout),
        lambda: expert.wait_work(timeout=timeout),
        lambda: expert.wait_peer(0, timeout=timeout),
        lambda: expert.wait_placement(0, timeout=timeout),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match="^timeout: expected seconds"):
            call()
    answer(expert)
    attention.combine_recv()


@pytest.mark.parametrize("store", ["127.0.0.1:29500", "[::1]:80", "host:1"])
def test_an_address_without_its_scheme_is_no_directory(store: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=re.escape(f"write tcp://{store} for a store that is served there, or ./{store}")
    ):
        m2n.ExpertComm(0, SMALL, ONE, store, config=NUMPY)
    assert not list(tmp_path.iterdir())
    m2n.ExpertComm(0, SMALL, ONE, f"./{store}", config=NUMPY).close()
    assert (tmp_path / store).is_dir()


def test_an_error_without_words_is_told_by_its_type() -> None:
    assert first_line(OSError()) == "OSError()" and first_line(RuntimeError(" \n")) == "RuntimeError(' \\n')"
    assert first_line(RuntimeError("\nfirst\nsecond")) == "first"


def test_a_store_that_fails_without_words_is_a_setup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(m2n.SetupError, match=r"cannot reach, .*OSError\(\); serve it"):
        open_store("tcp://127.0.0.1:1", Deadline(0.3), 0.1)


# ---- 20: arithmetic

LIBM = ctypes.CDLL("libm.so.6")
MODES = {"to zero": 0xC00, "up": 0x800, "down": 0x400}  # of <fenv.h>, on x86-64


@contextmanager
def environment(mode: str) -> Iterator[None]:
    if mode == "flush to zero":
        torch = pytest.importorskip("torch")
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush to zero")
    elif LIBM.fesetround(MODES[mode]) != 0:
        pytest.skip("other numbers of rounding modes than x86-64's")
    try:
        yield
    finally:
        if mode == "flush to zero":
            torch.set_flush_denormal(False)
        else:
            LIBM.fesetround(0)


def exchange(folder: Path, device: str, dispatch_dtype: str, reduce_at: str, mode: str | None) -> bytes:
    """The bits of one exchange whose sums must round and whose numbers are partly subnormal."""
    shape = m2n.Shape(256, 4, 4, 8, dispatch_dtype=dispatch_dtype, combine_dtype="float32", reduce_at=reduce_at)
    draw = np.random.default_rng(7)
    x = (draw.standard_normal((5, 256)) * np.array([1, 1e-38, 1e-41, 3e4, 1e-3])[:, None]).astype(np.float32)
    ids, weights = np.tile(np.arange(4), (5, 1)), draw.random((5, 4))  # float64: routes round them
    config = m2n.Config(arrays="numpy", transport="shm")
    with m2n.ExpertComm(0, shape, ONE, folder, device=device, config=config) as expert:
        with m2n.AttentionComm(0, shape, ONE, folder, device=device, config=config) as attention:
            with environment(mode) if mode else contextmanager(lambda: iter([None]))():
                attention.dispatch_send(x, attention.route(ids, weights))
                batch = expert.dispatch_recv()
                assert batch is not None
                seen = np.asarray(batch.x).view(np.uint8).tobytes()
                y = np.repeat(x[None], 4, 0).reshape(20, 256)[: batch.num_pairs].copy()
                expert.combine_send(batch, y)
                out = attention.combine_recv()
                attention.check() if device != "cpu" else None
            return seen + out.tobytes()


@pytest.mark.parametrize("mode", [*MODES, "flush to zero"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_results_do_not_depend_on_the_floating_point_environment(mode: str, device: str, tmp_path: Path) -> None:
    for dispatch_dtype in ("float32", "float8_e4m3fn"):
        for reduce_at in ("expert", "attention"):
            plain = exchange(tmp_path / "plain", device, dispatch_dtype, reduce_at, None)
            assert exchange(tmp_path / "odd", device, dispatch_dtype, reduce_at, mode) == plain


def test_the_environment_of_the_caller_stays_as_it_was(pair: tuple[m2n.AttentionComm, m2n.ExpertComm]) -> None:
    attention, expert = pair
    with environment("up"):
        small_dispatch(attention)
        answer(expert)
        attention.combine_recv()
        assert LIBM.fegetround() == MODES["up"]
