# SPDX-License-Identifier: Apache-2.0
"""How two ranks find each other: the store gives an address, a control connection (channel.py) carries one handshake
(handshake.py), and stays open for the watcher.

Attention ranks connect, expert ranks listen: on a Unix socket, and on a network address where `Config.bind` names one.
What fails here is raised at once; what fails at the other side, or on the way there, is looked up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import re
import socket
from collections.abc import Collection, Iterator
from typing import Any

from . import data_connection
from ._C import SetupError
from .channel import (
    HANDSHAKE_TIMEOUT_S,
    MAX_ERROR_CHARS,
    Again,
    Channel,
    Late,
    NotNow,
    OutOfReach,
    Refused,
    TcpChannel,
    UnixChannel,
    close_all,
    speaking,
    split_address,
)
from .deadline import Deadline
from .handshake import (
    Identity,
    NativeComm,
    attach,
    check_introduction,
    descriptors,
    go_live,
    introduction,
    link_transport,
    offered,
    whereabouts,
)
from .interfaces import host_name
from .notes import printable, say
from .store import Store, look_up

# How long an address may be out of reach before it is taken for a wrong one.
_UNREACHABLE_S = 4.0
_FIRST_NOTE_S = 2.0
_NOTE_EVERY_S = 10.0
_PAUSE_S = 0.02
_MAX_ENTRY_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an expert rank listens, as it publishes it."""

    life: int
    address: str  # of its Unix socket
    host: str  # host_name() where that socket is
    network_address: str  # host:port, or "": none

    @classmethod
    def parse(cls, key: str, value: bytes) -> Address:
        """What a store holds, by whomever it was written. Raises Again: it is none."""
        try:
            if len(value) > _MAX_ENTRY_BYTES:
                raise ValueError
            entry = json.loads(value)
            address = cls(*(entry[field.name] for field in dataclasses.fields(cls)))
            address._check()
            return address
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Again(
                f"store: the value of {key!r} is not an address of m2n: {printable(repr(bytes(value[:100])), 120)}"
            ) from error

    def _check(self) -> None:
        """Raises ValueError where a field is none."""
        if type(self.life) is not int or not 0 <= self.life < 2**64:
            raise ValueError("life")
        for text, most in ((self.address, 100), (self.host, 200), (self.network_address, 100)):
            if not isinstance(text, str) or not re.fullmatch(rf"[!-~]{{0,{most}}}", text):
                raise ValueError("text")
        if self.network_address:  # never a name: nobody is asked what it stands for
            host, port = split_address(self.network_address)
            ipaddress.ip_address(host)
            if port == 0:
                raise ValueError("port")

    def __str__(self) -> str:
        return self.network_address or self.address


def publish(store: Store, identity: Identity, address: str = "", network_address: str = "") -> None:
    """Makes a rank findable, at a listener's addresses; the last life published wins."""
    entry = Address(identity.life, address, host_name(), network_address)
    try:
        store.set(identity.store_key(identity.role, identity.rank), json.dumps(dataclasses.asdict(entry)))
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"store: cannot be written: {error}") from error


def connect(
    native: NativeComm,
    identity: Identity,
    store: Store,
    expert_rank: int,
    deadline: Deadline,
    ended: Collection[int] = (),
) -> None:
    """Joins one expert rank: looks its address up, again if it is stale, until the deadline.

    ended: lives that have left, which is final.

    Raises:
        SetupError: it did not appear in time, cannot be reached, or refused; or this process is short of something.
    """
    began = deadline.passed
    note_at, lost_from = began + _FIRST_NOTE_S, None
    problem = "it has not published its address"
    key = identity.store_key("expert", expert_rank)
    while True:
        waited_s = deadline.passed - began
        if deadline.has_expired:
            raise SetupError(
                f"{identity}: expert rank {expert_rank} could not be joined within {waited_s:.1f} s: {problem}; is it "
                f"running, with the same store, job {identity.job!r} and name {identity.name!r}? This is "
                f"{whereabouts(identity)}"
            )
        if deadline.passed >= note_at:
            say(
                f"{identity} waits for expert rank {expert_rank}, {waited_s:.0f} s so far: {problem} (job "
                f"{identity.job!r}, name {identity.name!r}, {whereabouts(identity)})",
                is_always=True,
            )
            note_at = deadline.passed + _NOTE_EVERY_S
        try:
            address = _find(store, key, deadline.cut(1.0), ended)
            if address is None:
                continue
            _greet(native, identity, address, expert_rank, deadline.cut(HANDSHAKE_TIMEOUT_S))
            return
        except OutOfReach as error:
            # No way to there at all: that does not mend itself, but for an interface that is coming up.
            problem, lost_from = str(error), lost_from or deadline.passed
            if deadline.passed - lost_from >= _UNREACHABLE_S:
                raise SetupError(
                    f"{identity}: expert rank {expert_rank} listens at {address}, which cannot be reached from here: "
                    f"{error}; is its Config.bind (M2N_BIND) an address of the right network, and the port open?"
                ) from error
        except Again as error:
            problem, lost_from = str(error), None
        deadline.sleep(_PAUSE_S)


def _find(store: Store, key: str, deadline: Deadline, ended: Collection[int]) -> Address | None:
    """What is published; None: nothing by the deadline. Raises Again: nothing that can be joined."""
    value = look_up(store, key, deadline)
    if value is None:
        return None
    address = Address.parse(key, value)
    if address.life in ended:
        raise Again("the life that it has published has left, and no other one has come")
    return address


@contextlib.contextmanager
def _at(address: Address) -> Iterator[None]:
    """Says of what is wrong at an address that it is there: a new life may be on its way."""
    try:
        yield
    except (OutOfReach, NotNow):
        raise
    except Late as error:
        raise Again(f"at {address} it accepted but did not answer in time") from error
    except Again as error:
        raise Again(f"its address {address} is stale ({error})") from error


def _open_channel(identity: Identity, address: Address, expert_rank: int, deadline: Deadline) -> Channel:
    if address.host == host_name():
        with speaking("its Unix socket"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with speaking("its Unix socket", connection, deadline):
                connection.connect("\0" + address.address)
            return UnixChannel(connection, deadline)
        except BaseException:
            connection.close()
            raise
    if not address.network_address:
        raise NotNow(
            f"expert rank {expert_rank} runs on another host or in another network namespace, and listens on no "
            "network address; give it Config(bind=...) or M2N_BIND, an address, an interface or a network of its host"
        )
    if identity.job_key is None and not identity.insecure:
        raise Refused(
            f"{identity}: expert rank {expert_rank} runs on another host, at {address}: all ranks need the same "
            "Config(job_key=...) or M2N_JOB_KEY, or Config(insecure=True) where the network is yours alone"
        )
    connection = _reach(address.network_address, deadline.cut(_UNREACHABLE_S / 2))
    try:
        return TcpChannel(connection, identity.job_key, is_listener=False, deadline=deadline)
    except BaseException:
        connection.close()
        raise


def _reach(network_address: str, deadline: Deadline) -> socket.socket:
    """Connects. Raises OutOfReach, and Again where only nobody listens."""
    try:
        with speaking(network_address):
            return socket.create_connection(split_address(network_address), timeout=deadline.remaining())
    except Again as error:
        if isinstance(error.__cause__, ConnectionRefusedError):
            raise
        raise OutOfReach(f"{network_address} cannot be reached: {error.__cause__}") from error


def _greet(native: NativeComm, identity: Identity, address: Address, expert_rank: int, deadline: Deadline) -> None:
    with _at(address), _open_channel(identity, address, expert_rank, deadline) as channel:
        transport = link_transport(identity, channel)
        number = identity.next_link(expert_rank, address.life)
        with offered(native, expert_rank, address.life, transport, number) as offer:
            about = introduction(identity, offer, transport, channel.needs_heartbeats)
            channel.send({**about, "to_life": address.life}, descriptors(offer))
            with contextlib.ExitStack() as stack:
                data = None
                if transport == "tcp" and not channel.is_local:
                    data = stack.enter_context(_data_connection(identity, channel, expert_rank))
                message, fds = _answer(identity, channel, expert_rank)
                stack.callback(close_all, fds)
                if transport == "tcp" and channel.is_local:
                    data = stack.enter_context(data_connection.received(fds))
                _check(identity, message, len(fds), transport, offer)
                with _telling(channel):
                    attach(native, offer["peer_idx"], message, fds, data)
            channel.send({"joined": True}, [])
            go_live(native, identity, offer["peer_idx"], message, channel)


@contextlib.contextmanager
def _telling(channel: Channel) -> Iterator[None]:
    """What fails here is told to the other side, which waits; unless that is why it failed."""
    try:
        yield
    except SetupError as error:
        if channel.has_ended():
            raise Again(f"it has ended meanwhile: {error}") from error
        with contextlib.suppress(SetupError):
            channel.send({"error": printable(error, MAX_ERROR_CHARS)}, [])
        raise


def _answer(identity: Identity, channel: Channel, expert_rank: int) -> tuple[dict[str, Any], list[int]]:
    """The expert rank's next message. Raises Refused, and Again where that is what it says."""
    message, fds = channel.receive()
    if "error" not in message:
        return message, fds
    close_all(fds)
    error = printable(message["error"], MAX_ERROR_CHARS)
    if message.get("again") is True:
        raise NotNow(f"it says: {error}")
    raise Refused(f"{identity} was refused by expert rank {expert_rank}: {error}")


def _check(identity: Identity, message: dict[str, Any], num_fds: int, transport: str, offer: dict[str, Any]) -> None:
    try:
        check_introduction(identity, message, num_fds, transport)
        if message["link"] != offer["link"]:
            raise SetupError(f"handshake: it numbers this link {message['link']}, {identity} {offer['link']}")
    except SetupError as error:
        raise Refused(str(error)) from error


def _data_connection(identity: Identity, channel: Channel, expert_rank: int) -> socket.socket:
    """To the same address, by the token that the expert rank tells. Raises Refused, Again, Shortage."""
    message, fds = _answer(identity, channel, expert_rank)
    close_all(fds)
    try:
        token = bytes.fromhex(message["token"])
        if len(token) != data_connection.TOKEN_BYTES:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"handshake: expert rank {expert_rank} told no token for the data connection") from error
    return data_connection.connect(channel.connection, channel.session, token, channel.deadline)
