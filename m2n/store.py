# SPDX-License-Identifier: Apache-2.0
"""Stores: where ranks publish and find addresses. They carry nothing else."""

from __future__ import annotations

import datetime
import os
import re
import socket
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ._C import SetupError
from .channel import Again, join_address
from .deadline import Deadline
from .notes import say

_PAUSE_S = 0.2
_MAX_VALUE_BYTES = 1 << 20


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), repr(error))


@runtime_checkable
class Store(Protocol):
    """What a store must offer; `torch.distributed.Store` does."""

    def set(self, key: str, value: Any) -> Any:
        """Publishes a value (str or bytes); the last one wins."""

    def get(self, key: str) -> Any:
        """The value of a key that is there, as str or bytes."""

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> Any:
        """Returns when all keys are there; raises when `timeout` has passed."""


class PathStore:
    """A directory that all ranks see: one small file per key."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(os.path.abspath(path))  # the working directory may change later
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"store: cannot use the directory {self._path}: {error}") from error

    def _file(self, key: str) -> Path:
        return self._path / urllib.parse.quote(key, safe="")

    def set(self, key: str, value: str | bytes) -> None:
        """Writes aside and renames, so that a reader sees the old value or the new one, whole."""
        data = value.encode() if isinstance(value, str) else value
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, prefix=".set-", delete=False) as file:
                file.write(data)
            os.replace(file.name, self._file(key))
        except OSError as error:
            raise SetupError(f"store: cannot write to the directory {self._path}: {error}") from error

    def get(self, key: str) -> bytes:
        """The value of a key that is there; its beginning, where somebody has left more than any value has."""
        # What lies there may be anything: not to wait for the writer of a pipe.
        with open(os.open(self._file(key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(_MAX_VALUE_BYTES) or b""

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None:
        """Looks every few milliseconds until all keys are there."""
        deadline = Deadline(timeout.total_seconds())
        pause = 0.001
        while not all(self._file(key).exists() for key in keys):
            if deadline.has_expired:
                raise TimeoutError(f"no {keys} in {self._path}")
            deadline.sleep(pause)
            pause = min(2 * pause, 0.05)


def _split_url(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ValueError(f"store: expected tcp://host:port, got {url!r}")
    return parts.hostname, port


def _torch_store(url: str, **options: Any) -> Any:
    try:
        from torch.distributed import TCPStore
    except ImportError as error:
        raise SetupError(
            f"store: {url} is served by torch, which is not installed; install torch, or use a path as the store"
        ) from error
    return TCPStore(wait_for_workers=False, **options)


def _reach(url: str, deadline: Deadline, attempt_s: float, who: str) -> Store:
    """A store that is served somewhere, now or by the deadline; each attempt may take `attempt_s`."""
    host, port = _split_url(url)
    while True:
        attempt = deadline.cut(attempt_s)
        try:
            # torch's client has no quiet way to find nobody there, and keeps its deadline roughly.
            socket.create_connection((host, port), timeout=max(attempt.remaining(), 1e-3)).close()
            timeout = datetime.timedelta(seconds=max(attempt.remaining(), 0.05))
            store: Store = _torch_store(url, host_name=host, port=port, is_master=False, timeout=timeout)
            return store
        except SetupError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            problem = (
                f"store: cannot reach, within {deadline.seconds:.3g} s, {url}: {first_line(error)}; serve it "
                f"with `python -m m2n store {url}` or m2n.host_store()"
            )
            if deadline.has_expired:
                raise SetupError(problem) from error
            say(f"{who} waits for its store, {deadline.passed:.0f} s so far: {problem}")
            attempt.sleep(_PAUSE_S)


class HostedStore:
    """A store that this process serves. Close it after the last rank has joined; `url` is what the ranks take."""

    def __init__(self, url: str) -> None:
        host, port = _split_url(url)
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = socket.create_server(address[:2], family=family, backlog=1024)
        except OSError as error:
            raise SetupError(f"store: cannot serve {url}: {error}") from error
        port = listening.getsockname()[1]
        self.url = f"tcp://{join_address(host, port)}"
        try:
            self._store: Any = _serve(self.url, host, port, listening)
        except RuntimeError as error:
            raise SetupError(f"store: cannot serve {url}: {first_line(error)}") from error
        finally:
            listening.close()

    def close(self) -> None:
        """Ends the service."""
        self._store = None

    def __enter__(self) -> HostedStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _serve(url: str, host: str, port: int, listening: socket.socket) -> Any:
    """torch's server at this socket: by itself it would listen on every interface."""
    fd = os.dup(listening.fileno())
    options = {"host_name": host, "port": port, "is_master": True, "master_listen_fd": fd}
    options["timeout"] = datetime.timedelta(seconds=30)
    try:
        return _torch_store(url, **options)
    except RuntimeError as error:
        if "listen fd" not in str(error):
            raise
        return _torch_store(
            url, use_libuv=False, **options
        )  # some versions of torch know it of their older server only


def host_store(url: str = "tcp://127.0.0.1:0") -> HostedStore:
    """Serves a store from this process, by torch's TCPStore, at this address alone; port 0 takes a free one.

    Raises:
        SetupError: torch is missing or the port is taken. ValueError: not a tcp:// URL.
    """
    return HostedStore(url)


def open_store(store: Any, deadline: Deadline, attempt_s: float, who: str = "this process") -> Store:
    """The store behind what a user gave: a path, a tcp:// URL, or an object with set, get and wait.

    Raises:
        SetupError: it cannot be reached by the deadline. TypeError: it is none of these. ValueError: what may be an
            address or a path.
    """
    if isinstance(store, str) and "://" in store:
        return _reach(store, deadline, attempt_s, who)
    if isinstance(store, str) and re.fullmatch(r"[^/]+:\d+", store):
        raise ValueError(
            f"store: {store!r} may be an address or a path; write tcp://{store} for a store that is served there, or "
            f"./{store} for a directory"
        )
    if isinstance(store, (str, os.PathLike)):
        return PathStore(store)
    if isinstance(store, HostedStore):
        return open_store(store.url, deadline, attempt_s, who)
    if isinstance(store, Store):
        return store
    raise TypeError(
        f"store: expected a path, 'tcp://host:port', or an object with set, get and wait, got {type(store).__name__}"
    )


def describe_store(store: Any) -> str:
    """What a user gave as a store, so that two processes can tell whether they have the same one."""
    if isinstance(store, HostedStore):
        return store.url
    if isinstance(store, (str, os.PathLike)):
        path = os.fspath(store)
        return path if "://" in path else os.path.abspath(path)
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return type(store).__name__ + (f" at {join_address(host, port)}" if host and port else "")


def look_up(store: Store, key: str, deadline: Deadline) -> bytes | None:
    """The value of a key, or None when it is not there by the deadline.

    Raises:
        SetupError: the store failed. Again: the value is neither str nor bytes.
    """
    began = deadline.passed
    timeout_s = max(deadline.remaining(), 0.01)
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
        value = store.get(key)
    except SetupError:
        raise
    except Exception as error:
        # Stores differ in what they raise at a timeout; one that fails at once has failed for another reason.
        if deadline.passed - began >= 0.5 * timeout_s:
            return None
        raise SetupError(f"store: cannot be read any more: {first_line(error)}") from error
    if isinstance(value, str):
        return value.encode(errors="replace")
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise Again(f"store: the value of {key!r} is neither str nor bytes, but {type(value).__name__}")
    return bytes(value)
