"""The engine that queries vLLM's OpenAI-compatible server, or several that serve the same model.

How the model is spread over GPUs and nodes, and in what dtype, is decided where the server is started.
"""

import re
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from fusion_trainer.config import ExtractConfig
from fusion_trainer.representations.engine import Distributions, Query
from fusion_trainer.representations.model_servers import BrokenReplyError, ModelServers, RefusedError
from fusion_trainer.representations.vllm_engine import TooFewError, reduced
from varm_common.endpoints import key_from
from varm_common.errors import UserError

__all__ = ["VllmServer"]

COMPLETIONS = "/v1/completions"
LIMIT = re.compile(r"max(?:imum)? allowed:? (\d+)|max_logprobs\D*(\d+)", re.IGNORECASE)


class VllmServer:
    """vLLM servers at the URLs of ``config``; each text is a request.

    Raises:
        UserError: A server cannot be reached, serves another model, or gives no or too few log-probabilities.
    """

    batch_tokens = 1  # the server makes its own batches
    rows: int | None = None  # the server refuses ids that it does not know

    def __init__(self, config: ExtractConfig, known: frozenset[int]) -> None:
        self.model, self.known = config.model, known
        key = key_from(config.server_key_env, "the server")
        urls = [url for given in config.server_url for url in given.split(",") if url]
        self.servers = ModelServers(urls, key, config.server_timeout, config.server_concurrency)
        try:
            described = [self._described(url, config) for url in self.servers.urls]
            self.name = described[0]["id"]
            if len({model["id"] for model in described}) > 1:
                raise UserError("the servers have different names for the model: give them the same")
            for url in self.servers.urls:
                self._try(url, config.top_k)
        except BaseException:
            self.servers.close()
            raise
        lengths = [model["max_model_len"] for model in described if model.get("max_model_len")]
        self.context: int | None = min(lengths) - 1 if lengths else None  # vLLM always generates one token
        self.ahead = 2 * config.server_concurrency * len(self.servers.urls)
        versions = sorted({self._version(url) for url in self.servers.urls})
        self.made_with = {"engine": "vllm", "vllm": ", ".join(versions), "served_model": self.name}
        if lengths:
            self.made_with["max_model_len"] = str(min(lengths))

    def _described(self, url: str, config: ExtractConfig) -> dict[str, Any]:
        """What a server says of the model."""
        reply = self.servers.once(url, "/v1/models")
        models = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) and "id" in model for model in models):
            raise UserError(f"{url}/v1/models lists no models: is it a vLLM server?")
        wanted = {config.server_model} if config.server_model else {config.model, config.model.rstrip("/")}
        if not config.server_model and Path(config.model).is_dir():
            wanted.add(str(Path(config.model).resolve()))
        for model in models:
            if wanted & {str(model["id"]), str(model.get("root"))}:
                return dict(model)
        served = ", ".join(f"`{model['id']}`" for model in models) or "nothing"
        raise UserError(
            f"{url} serves {served} and not `{config.server_model or config.model}`. If it is the same, give "
            "its name there with --server-model; if not, start the server with this model"
        )

    def _try(self, url: str, k: int) -> None:
        """Check that a server gives as many log-probabilities as are needed."""
        tokens = sorted(self.known)[:1] * 2
        try:
            reply = self.servers.once(url, COMPLETIONS, self._body(tokens, k))
        except RefusedError as error:
            raise self._explained(error, url, k) from error
        try:
            entries_in(reply, len(tokens))
        except BrokenReplyError as error:
            raise UserError(f"{url} gives no prompt_logprobs: {error}. Is it a vLLM server?") from error

    def _explained(self, error: RefusedError, url: str, k: int) -> UserError:
        if limit := LIMIT.search(error.message):
            return UserError(
                f"{url} gives at most {limit[1] or limit[2]} log-probabilities, and {k} are needed: start it with "
                f"`--max-logprobs {k}`, or lower --top-k"
            )
        return UserError(f"{url} refuses a completion of `{self.model}`: {error.message}")

    def _version(self, url: str) -> str:
        try:
            return str(self.servers.once(url, "/version")["version"])
        except (UserError, KeyError, TypeError):
            return "unknown"

    def _body(self, tokens: list[int], k: int) -> dict[str, Any]:
        name = self.name or self.model
        return {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}

    def start(self, batch: Sequence[Query], k: int) -> "Future[Distributions]":
        (query,) = batch
        return self.servers.submit(self._distributions, query, k)

    def _distributions(self, query: Query, k: int) -> Distributions:
        asked = k
        while True:
            try:
                body = self._body(query.ids.tolist(), asked)
                return self.servers.request(COMPLETIONS, body, query.name, partial(self._read, query, k, asked))
            except TooFewError as error:
                asked = k + error.absent
            except RefusedError as error:
                if asked > k:
                    raise self._explained(error, "the server", asked) from error
                raise

    def _read(self, query: Query, k: int, asked: int, reply: Any) -> Distributions:
        entries = entries_in(reply, len(query.ids))
        try:
            wanted = (
                {int(token): float(entry["logprob"]) for token, entry in entries[position + 1].items()}
                for position in query.positions.tolist()
            )
            return reduced(query, wanted, k, asked, self.known)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BrokenReplyError(f"its prompt_logprobs cannot be used: {error}") from error

    def why_not_finite(self) -> str:
        return "Start the server with a wider --dtype"

    def close(self) -> None:
        self.servers.close()


def entries_in(reply: Any, tokens: int) -> list[Any]:
    """``prompt_logprobs`` of a completion of this many tokens: None, then an entry per token.

    Raises:
        BrokenReplyError: They are missing or of another length.
    """
    try:
        entries = reply["choices"][0]["prompt_logprobs"]
    except (LookupError, TypeError) as error:
        raise BrokenReplyError("the reply has no prompt_logprobs") from error
    if not isinstance(entries, list) or len(entries) != tokens:
        content = f"{len(entries)} entries" if isinstance(entries, list) else type(entries).__name__
        raise BrokenReplyError(f"prompt_logprobs has {content}, not one for each of {tokens} tokens")
    return entries
