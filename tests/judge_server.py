"""A real HTTP server that speaks ``/chat/completions``, and can fail as such servers do.

Its answer is a function of the request. The first requests get the faults, one each, in order.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | dict[str, float] | None
"""A text, the probabilities of tokens, or nothing."""


@dataclass
class Fault:
    """A status with headers, or a trick: ``sleep``, ``reset``, ``cut``, ``no choices``, ``no text``, ``html``.

    The tricks ``length`` and ``content_filter`` are reasons to end a reply before its text; ``error`` is the body
    of an error with status 200.
    """

    status: int = 200
    trick: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": {"message": "not now"}})


@dataclass
class Judge:
    """The state of the server: the requests and their times, and how it answers."""

    answer: Callable[[dict[str, Any]], Answer]
    faults: list[Fault] = field(default_factory=list)
    key: str | None = None
    hanging: float = 3.0
    usage: bool = True
    newer: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], Answer], faults: Sequence[Fault] = (), **own: Any
) -> Iterator[Judge]:
    """A judge at ``judge.url`` for the length of the block."""
    judge = Judge(answer, list(faults), **own)
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"judge": judge}))
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        pass  # clients that were killed, or have lost patience


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each reply, sent as head and body, waits 40 ms
    judge: Judge

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with judge.lock:
            judge.requests.append(body)
            judge.times.append(time.monotonic())
            judge.keys.add(self.headers["authorization"])
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
            fault = judge.faults.pop(0) if judge.faults else Fault()
        try:
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": "no such path"}})
            elif judge.key and (sent := self.headers.get("authorization")) != f"Bearer {judge.key}":
                self._send(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
            elif judge.newer and "max_tokens" in body:
                message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
                self._send(400, {"error": {"message": message, "code": "unsupported_parameter"}})
            elif fault.status != 200:
                self._send(fault.status, fault.body, fault.headers)
            else:
                self._reply(body, fault.trick)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def _reply(self, body: dict[str, Any], trick: str) -> None:
        if trick == "sleep":
            time.sleep(self.judge.hanging)
        if trick == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        reply = completion(body, self.judge.answer(body), self.judge.usage)
        if trick == "no choices":
            reply["choices"] = []
        if trick in ("no text", "length", "content_filter"):
            reply["choices"][0]["message"]["content"] = None
        if trick in ("length", "content_filter"):
            reply["choices"][0]["finish_reason"] = trick
        if trick == "error":
            reply = {"error": {"message": "not now"}}
        if trick == "html":
            self._send(200, b"<html>the proxy is not well</html>", {"content-type": "text/html"})
        elif trick == "cut":
            self._send(200, json.dumps(reply).encode()[:-20])
        elif trick == "short":  # fewer bytes than were promised
            self._send(200, json.dumps(reply).encode()[:-20], {"content-length": str(len(json.dumps(reply)))})
            self.close_connection = True
        else:
            self._send(200, reply)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(content))}.items():
            self.send_header(name, (headers or {}).pop(name, value))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:  # the client has lost patience
            self.close_connection = True


def completion(body: dict[str, Any], answer: Answer, usage: bool = True) -> dict[str, Any]:
    """What a server of this protocol sends for an answer."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
    choice["message"]["content"] = answer if isinstance(answer, str) else max(answer or {"": 1.0}, key=str)
    if isinstance(answer, dict):
        top = [{"token": token, "bytes": None, "logprob": logprob} for token, logprob in answer.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}] if top else []}
    words = [len(message["content"].split()) for message in body["messages"]]
    counted = {"prompt_tokens": sum(words), "completion_tokens": 5, "total_tokens": sum(words) + 5}
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        **({"usage": counted} if usage else {}),
    }
