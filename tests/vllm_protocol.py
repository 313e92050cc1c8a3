"""A small server that speaks vLLM's protocol, answers with a real tiny model, and can fail as servers do."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Served:
    """The state of a server: faults, one for each of the next requests, and the prompts it has answered.

    Faults: a status, ``sleep``, ``reset``, ``cut``, ``html``, ``short`` (too few entries), ``no gold``.
    """

    name: str
    model: Any
    max_logprobs: int = 20
    max_model_len: int = 1024
    key: str | None = None
    faults: list[Any] = field(default_factory=list)
    answered: list[tuple[int, ...]] = field(default_factory=list)
    requests: int = 0
    port: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @torch.no_grad()
    def prompt_logprobs(self, prompt: list[int], k: int) -> list[Any]:
        with self.lock:
            logprobs_LV = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for row_V, token in zip(logprobs_LV, prompt[1:], strict=False):
            best = row_V.topk(k)
            ids = [token, *best.indices.tolist()]
            entries.append({str(one): {"logprob": float(row_V[one]), "rank": 1} for one in ids})
        return entries


@contextmanager
def serving(folder: Path, faults: Sequence[Any] = (), port: int = 0, **own: Any) -> Iterator[Served]:
    """A server of the model in ``folder`` for the length of the block."""
    model = own.pop("model", None) or AutoModelForCausalLM.from_pretrained(folder).eval()
    served = Served(own.pop("name", str(folder)), model, faults=list(faults), **own)
    server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"served": served}))
    served.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *arguments: object) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: Served

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.served
        if served.key and self.headers["authorization"] != f"Bearer {served.key}":
            return self._send(401, {"error": f"wrong key {self.headers['authorization']}"})
        model = {"id": "tiny", "root": served.name, "max_model_len": served.max_model_len}
        return self._send(200, {"data": [model]} if self.path == "/v1/models" else {"version": "0.0.test"})

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, k = body["prompt"], body["prompt_logprobs"]
        with served.lock:
            served.requests += 1
            fault = served.faults.pop(0) if served.faults and len(prompt) > 2 else None
        if k > served.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {served.max_logprobs}"
            return self._send(400, {"error": {"message": message}})
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": "not now"}})
        if fault == "sleep":
            time.sleep(2.5)
        if fault == "reset":
            self.close_connection = True
            return None
        assert body["model"] == "tiny"
        assert body["max_tokens"] == 1
        assert len(prompt) < served.max_model_len
        entries = served.prompt_logprobs(prompt, k)
        if fault == "short":
            entries = entries[:-1]
        if fault == "no gold":
            entries = [None, *({"0": {"logprob": -1.0}} for _ in entries[1:])]
        reply = json.dumps({"choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]}).encode()
        if fault is None:
            served.answered.append(tuple(prompt))
        if fault == "html":
            return self._send(200, b"<html>the proxy is not well</html>")
        if fault == "cut":
            self._send(200, reply[:-20], len(reply))
            self.close_connection = True
            return None
        return self._send(200, reply)

    def _send(self, status: int, body: Any, length: int | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(length or len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            self.close_connection = True
