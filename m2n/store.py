# SPDX-License-Identifier: Apache-2.0
"""Stores: where ranks publish and find addresses. They carry nothing else."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ._C import SetupError


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
        self._path = Path(path)
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
        """The value of a key that is there."""
        return self._file(key).read_bytes()

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None:
        """Looks every few milliseconds until all keys are there."""
        deadline = time.monotonic() + timeout.total_seconds()
        pause = 0.001
        while not all(self._file(key).exists() for key in keys):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no {keys} in {self._path}")
            time.sleep(pause)
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


def _tcp_store(url: str, is_master: bool, timeout_s: float) -> Any:
    host, port = _split_url(url)
    try:
        from torch.distributed import TCPStore
    except ImportError as error:
        raise SetupError(
            f"store: {url} is served by torch, which is not installed; install torch, or use a path as the store"
        ) from error
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, port, is_master=is_master, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        doing = "cannot serve" if is_master else f"cannot reach, within {timeout_s:g} s,"
        hint = "" if is_master else f"; serve it with `python -m m2n store {url}` or m2n.host_store()"
        raise SetupError(f"store: {doing} {url}: {str(error).splitlines()[0]}{hint}") from error


class HostedStore:
    """A store that this process serves. Close it after the last rank has joined; `url` is what the ranks take."""

    def __init__(self, url: str) -> None:
        self._store: Any = _tcp_store(url, is_master=True, timeout_s=30.0)
        host, _ = _split_url(url)
        self.url = f"tcp://{host}:{self._store.port}"

    def close(self) -> None:
        """Ends the service."""
        self._store = None

    def __enter__(self) -> HostedStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def host_store(url: str = "tcp://127.0.0.1:0") -> HostedStore:
    """Serves a store from this process, by torch's TCPStore; port 0 takes a free one.

    Raises:
        SetupError: torch is missing or the port is taken. ValueError: not a tcp:// URL.
    """
    return HostedStore(url)


def open_store(store: Any, timeout_s: float) -> Store:
    """The store behind what a user gave: a path, a tcp:// URL, or an object with set, get and wait.

    Raises:
        SetupError: it cannot be reached within `timeout_s`. TypeError: it is none of these.
    """
    if isinstance(store, str) and "://" in store:
        opened: Store = _tcp_store(store, is_master=False, timeout_s=timeout_s)
        return opened
    if isinstance(store, (str, os.PathLike)):
        return PathStore(store)
    if isinstance(store, HostedStore):
        return open_store(store.url, timeout_s)
    if isinstance(store, Store):
        return store
    raise TypeError(
        f"store: expected a path, 'tcp://host:port', or an object with set, get and wait, got {type(store).__name__}"
    )


def look_up(store: Store, key: str, timeout_s: float) -> bytes | None:
    """The value of a key, or None when it is not there after `timeout_s`.

    Raises:
        SetupError: the store failed.
    """
    began = time.monotonic()
    try:
        store.wait([key], datetime.timedelta(seconds=max(timeout_s, 0.01)))
        value = store.get(key)
    except SetupError:
        raise
    except Exception as error:
        # Stores differ in what they raise at a timeout; one that fails at once has failed for another reason.
        if time.monotonic() - began >= 0.5 * timeout_s:
            return None
        raise SetupError(f"store: cannot be read any more: {str(error).splitlines()[0]}") from error
    return value.encode() if isinstance(value, str) else bytes(value)
