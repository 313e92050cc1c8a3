"""Requests to one or several servers that serve the same model: shared, repeated, and never lost.

A request goes to the server with the fewest requests. If a server cannot be reached, is busy (429, 502, 503,
504), or sends a reply that is broken or late, its requests go to the others, and it is tried again at growing
intervals. A request is repeated a few times if its reply is broken or late.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fusion_trainer.representations.engine import EngineStoppedError
from varm_common.endpoints import checked_url, without_key
from varm_common.errors import UserError, reason_of

__all__ = ["BrokenReplyError", "ModelServers", "RefusedError"]

Result = TypeVar("Result")

BUSY = (429, 502, 503, 504)
TRIES = 5
"""How often a request is sent that gets broken replies, or none in time."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
LONGEST_RETRY_AFTER_S = 120.0
CONNECT_S = 20.0


class RefusedError(UserError):
    """A server understands a request and does not accept it."""


class BrokenReplyError(ValueError):
    """A reply that is not what was asked for."""


class _BusyError(Exception):
    """A server cannot be reached, or takes no request now; ``wait`` is its ``Retry-After``."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(eq=False)
class _Server:
    """A server, its requests under way, and since when none was answered."""

    url: str
    requests: int = 0
    failures: int = 0
    failing_since: float = 0.0
    not_before: float = 0.0
    reason: str = ""


class ModelServers:
    """Servers that answer the same requests alike.

    Args:
        urls: Their addresses, with or without ``/v1``.
        key: Is sent as bearer token; it appears in no message.
        timeout: Seconds that a request may take, and that the servers may be out of reach, all of them.
        concurrency: Requests to each server at the same time.

    Raises:
        UserError: A URL is invalid.
    """

    def __init__(self, urls: Sequence[str], key: str, timeout: float, concurrency: int) -> None:
        self.urls = [checked_url(url, "--server-url").removesuffix("/v1") for url in urls]
        self.timeout, self.concurrency, self._key = timeout, concurrency, key
        self._servers = [_Server(url) for url in self.urls]
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._own = threading.local()
        self._open: set[HTTPConnection] = set()
        self._threads = ThreadPoolExecutor(concurrency * len(self.urls), "model-servers")

    def submit(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Run ``work``, which calls ``request``, in a thread of its own."""
        return self._threads.submit(work, *arguments)

    def once(self, url: str, path: str, body: Any = None) -> Any:
        """One server's reply to one request, for a check at the start.

        Raises:
            UserError: It cannot be reached, is busy, or sends no JSON.
            RefusedError: It does not accept the request.
        """
        try:
            return self._reply(url, path, body)
        except (_BusyError, BrokenReplyError, TimeoutError) as error:
            raise UserError(
                f"no usable reply from {url}{path}: {error}; start the server, or correct --server-url"
            ) from error
        except RefusedError as error:
            raise RefusedError(f"{url}{path}: {error.message}") from None

    def request(self, path: str, body: Any, name: str, read: Callable[[Any], Result]) -> Result:
        """What ``read`` makes of the reply of one of the servers; ``name`` names the request in messages.

        ``read`` raises BrokenReplyError for a reply that is not what was asked for.

        Raises:
            EngineStoppedError: No server can be reached, or this object is closed.
            RefusedError: A server does not accept the request.
            UserError: It gets no usable reply.
        """
        tried: list[_Server] = []
        for attempt in range(1, TRIES + 1):
            try:
                return read(self._from_any(path, body, name, tried))
            except (BrokenReplyError, TimeoutError) as error:
                late = isinstance(error, TimeoutError)
                reason = f"no reply within {self.timeout:g} s" if late else str(error)
            if attempt < TRIES:
                self._closed.wait(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S))
        advice = "raise --server-timeout or lower --server-concurrency" if late else "see the server's log"
        raise EngineStoppedError(
            f"{tried[-1].url} gave no usable reply to {TRIES} requests for {name}; the last: {reason}. "
            f"What was answered is kept: {advice}, and run the same command again"
        )

    def _from_any(self, path: str, body: Any, name: str, tried: list[_Server]) -> Any:
        """The reply of a server that is not busy; the server is added to ``tried``.

        Raises:
            BrokenReplyError, TimeoutError: The reply is broken or late.
        """
        while True:
            server = self._take(name, tried)
            failure: Exception | None = None
            try:
                return self._reply(server.url, path, body)
            except RefusedError as error:
                raise RefusedError(f"{server.url} refuses {name}: {error.message}") from None
            except (BrokenReplyError, TimeoutError, _BusyError) as error:
                failure = error
                if not isinstance(error, _BusyError):
                    raise
            finally:
                self._give_back(server, failure)
                if not isinstance(failure, _BusyError):
                    tried.append(server)

    def _take(self, name: str, tried: Sequence[_Server]) -> _Server:
        """The free server with the fewest requests, as soon as there is one.

        One that has failed at this request is taken only if there is no other that works.
        """
        with self._changed:
            while not self._closed.is_set():
                now = time.monotonic()
                others = [one for one in self._servers if one not in tried and not one.failures] if tried else []
                able = [server for server in others or self._servers if server.requests < self.concurrency]
                if free := [server for server in able if server.not_before <= now]:
                    server = min(free, key=lambda server: server.requests)
                    server.requests += 1
                    return server
                if all(server.failures and now - server.failing_since > self.timeout for server in self._servers):
                    gone = "; ".join(f"{server.url}: {server.reason}" for server in self._servers)
                    raise EngineStoppedError(
                        f"no server has answered for {self.timeout:g} s, first for {name} ({gone}). What was "
                        "answered is kept: start the server again and run the same command"
                    )
                self._changed.wait(min(0.5, max(0.01, min(one.not_before for one in self._servers) - now)))
        raise EngineStoppedError("the extraction has ended")

    def _give_back(self, server: _Server, failure: Exception | None) -> None:
        """End a request. After a failure the server waits, so that the next tries go to others."""
        with self._changed:
            server.requests -= 1
            now = time.monotonic()
            if failure is None:
                server.failures = 0
            elif server.not_before <= now:  # the first of several that fail together
                if not server.failures:
                    server.failing_since = now
                server.reason = str(failure) or type(failure).__name__
                wait = min(FIRST_WAIT_S * 2 ** min(server.failures, 10), LONGEST_WAIT_S)
                asked = failure.wait if isinstance(failure, _BusyError) else 0.0
                server.not_before = now + max(wait, min(asked, LONGEST_RETRY_AFTER_S))
                server.failures += 1
            self._changed.notify_all()

    def _reply(self, url: str, path: str, body: Any) -> Any:
        """The JSON that a server sends.

        Raises:
            TimeoutError: It did not come in time.
            BrokenReplyError: It is not JSON, is not complete, or the server failed at it.
            RefusedError: The server does not accept the request.
            _BusyError: The server cannot be reached or is busy.
        """
        status, headers, content = self._exchange(url, path, None if body is None else json.dumps(body).encode())
        if status == 200:
            try:
                return json.loads(content)
            except ValueError as error:
                raise BrokenReplyError(f"{len(content)} bytes that are not JSON ({error})") from error
        reason = without_key(f"status {status}, {_message_in(content)}", self._key)
        if status in BUSY:
            raise _BusyError(reason, _seconds(headers.get("retry-after", "")))
        if status >= 500:
            raise BrokenReplyError(reason)
        if status in (401, 403):
            reason += "; name the variable with the server's key with --server-key-env"
        raise RefusedError(reason)

    def _exchange(self, url: str, path: str, content: bytes | None) -> tuple[int, Any, bytes]:
        """Send a request and receive the whole reply, on this thread's connection to the server."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connections: dict[str, HTTPConnection] = self._own.__dict__.setdefault("connections", {})
        method = "GET" if content is None else "POST"
        while True:
            connection = kept = connections.pop(url, None)
            try:
                connection = connection or self._connected(url)
                connection.request(method, urlsplit(url).path + path, content, headers)
                response = connection.getresponse()
                received = response.read()
            except (OSError, HTTPException) as error:
                if connection is not None:
                    self._drop(connection)
                if kept and isinstance(error, ConnectionError) and not self._closed.is_set():
                    continue  # the server closes connections that were idle for a while
                if isinstance(error, TimeoutError):
                    raise
                if isinstance(error, OSError):
                    raise _BusyError(reason_of(error)) from error
                raise BrokenReplyError(f"the reply is not complete ({error!r})") from error
            if response.will_close:
                self._drop(connection)
            else:
                connections[url] = connection
            return response.status, response.headers, received

    def _connected(self, url: str) -> HTTPConnection:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.netloc, timeout=min(CONNECT_S, self.timeout))
        try:
            connection.connect()
        except OSError as error:
            raise _BusyError(f"no connection ({reason_of(error)})") from error
        connection.sock.settimeout(self.timeout)
        self._open.add(connection)
        return connection

    def _drop(self, connection: HTTPConnection) -> None:
        self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        """Give up every request."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        for connection in list(self._open):
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._threads.shutdown(wait=False, cancel_futures=True)


def _message_in(content: bytes) -> str:
    """The message of an error reply."""
    text = content.decode(errors="replace")
    with suppress(ValueError, AttributeError):
        body = json.loads(text)
        inner = body.get("error", body)
        return str(inner.get("message") or inner.get("detail") or text) if isinstance(inner, dict) else str(inner)
    return text


def _seconds(header: str) -> float:
    with suppress(ValueError):
        return float(header)
    return 0.0
