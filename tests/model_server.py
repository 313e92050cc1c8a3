"""A real HTTP server that runs models as OpenAI-compatible servers do: ``/models``, ``/completions``, and chats.

A prompt is a list of token ids. With ``echo`` the reply has the log-probability of each of them.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass
class Served:
    """The models by name, their ``root`` in ``/models``, and what was sent; ``silent``: chats have no text."""

    models: dict[str, Any]
    tokenizers: dict[str, Any]
    roots: Mapping[str, str]
    url: str = ""
    silent: bool = False
    requests: list[tuple[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def serving(folders: Mapping[str, Path], roots: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A server of these models at ``served.url`` for the length of the block."""
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()
    }
    tokenizers = {name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    served = Served(models, tokenizers, roots or {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: Served

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.served.keys.add(self.headers["authorization"])
        if self.path != "/v1/models":
            self._send(404, {})
            return
        listed = [{"id": name, **_root(self.served.roots.get(name))} for name in self.served.models]
        self._send(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.served.lock:
            self.served.keys.add(self.headers["authorization"])
            self.served.requests.append((self.path, body))
            if self.path == "/v1/chat/completions":
                words = body["messages"][-1]["content"].split()
                message = {"role": "assistant", "content": None if self.served.silent else words[-1]}
                self._send(200, {"choices": [{"index": 0, "message": message}]})
            elif self.path == "/v1/completions" and body["model"] in self.served.models:
                self._send(200, {"choices": list(self._choices(body))})
            else:
                self._send(404, {"error": f"no {body.get('model')} at {self.path}"})

    @torch.no_grad()
    def _choices(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        model, tokenizer = self.served.models[body["model"]], self.served.tokenizers[body["model"]]
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            if body.get("echo"):  # and one new token, as these servers give it
                logs = model(ids).logits[0].log_softmax(-1)
                chosen = [*prompt[1:], int(logs[-1].argmax())]
                own = [None, *(float(logs[place, token]) for place, token in enumerate(chosen))]
                best = [None, *({"best": float(logs[place].max())} for place in range(len(chosen)))]
                logprobs = {"token_logprobs": own, "top_logprobs": best}
                yield {"index": index, "text": tokenizer.decode([*prompt, chosen[-1]]), "logprobs": logprobs}
            else:
                answer = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)
                yield {"index": index, "text": tokenizer.decode(answer[0, len(prompt) :])}

    def _send(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _root(root: str | None) -> dict[str, str]:
    return {} if root is None else {"root": root}
