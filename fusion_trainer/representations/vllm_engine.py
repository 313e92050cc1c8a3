"""The engine that runs vLLM in this process, and how vLLM's prompt log-probabilities become distributions.

vLLM computes with its own kernels, on any number of GPUs. ``prompt_logprobs`` at index i is the distribution that
predicts token i: the k likeliest tokens, and the token that is really there.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fusion_trainer.config import ExtractConfig
from fusion_trainer.representations.engine import Distributions, Query
from varm_common.errors import UserError, reason_of
from varm_common.models import resolved_dtype

__all__ = ["TooFewError", "VllmEngine", "joined", "reduced"]

SPARE = 64
"""Log-probabilities that may be asked for beyond k, for ids that stand for no token."""
SLACK = 1e-3
"""How far the probabilities of the k may sum above 1, by rounding."""


class TooFewError(Exception):
    """``absent`` of the likeliest ids stand for no token, and so fewer than k do."""

    def __init__(self, absent: int) -> None:
        super().__init__(f"{absent} of the likeliest ids stand for no token")
        self.absent = absent


def reduced(
    query: Query, entries: Iterable[Mapping[int, float]], k: int, asked: int, known: frozenset[int]
) -> Distributions:
    """The distributions at a query's positions.

    Args:
        query: The text.
        entries: For each position, log-probabilities by id: those of the likeliest ids and of the gold token.
        k: Entries kept.
        asked: How many of the likeliest ids each entry has, at least k. The gold token may be one more.
        known: The ids that stand for a token.

    Raises:
        TooFewError: Fewer than k of the likeliest ids are known.
        ValueError: The gold token is missing, or these are no log-probabilities.
    """
    ids_SK, logprobs_SK = np.empty((len(query.positions), k), np.int32), np.empty((len(query.positions), k))
    gold_S = np.empty(len(query.positions))
    for place, (position, entry) in enumerate(zip(query.positions.tolist(), entries, strict=True)):
        gold = int(query.ids[position + 1])
        if gold not in entry:
            raise ValueError(f"no log-probability of token {gold} at position {position + 1}")
        likeliest = sorted(entry.items(), key=lambda item: (-item[1], item[0]))[:asked]
        if len(likeliest) < asked:
            raise ValueError(f"{len(entry)} log-probabilities at position {position + 1}, not {asked}")
        best = [(token, value) for token, value in likeliest if token in known]
        if len(best) < k:
            raise TooFewError(asked - len(best))
        ids_SK[place], logprobs_SK[place] = zip(*best[:k], strict=True)
        gold_S[place] = entry[gold]
    mass_S = np.exp(logprobs_SK).sum(1)
    if (mass_S > 1 + SLACK).any():
        raise ValueError(f"probabilities that sum to {mass_S.max():.4g}: start vLLM without --logprobs-mode")
    logprobs = logprobs_SK.astype(np.float32), gold_S.astype(np.float32)
    return Distributions(ids_SK, logprobs[0], np.clip(1 - mass_S, 0, 1).astype(np.float32), logprobs[1])


def joined(parts: Sequence[Distributions]) -> Distributions:
    """The distributions of several texts as those of a batch."""
    names = Distributions.__annotations__
    return Distributions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class VllmEngine:
    """vLLM's ``LLM`` in this process. A thread queries it, while the last batch is stored.

    Raises:
        UserError: vLLM is not installed, or cannot load the model.
    """

    ahead = 1

    def __init__(self, config: ExtractConfig, folder: Path, known: frozenset[int]) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"--engine vllm cannot import vLLM ({reason_of(error)}); install it here, or start `vllm serve "
                f"{config.model}` in an environment of its own and give its --server-url"
            ) from error
        self.name, self.known, self.batch_tokens = config.model, known, config.batch_tokens
        code = config.trust_remote_code
        own = {"dtype": resolved_dtype(folder, config.dtype, code), "max_logprobs": config.top_k + SPARE}
        options = {**own, "trust_remote_code": code, **(config.engine_options or {})}
        try:
            self.llm = vllm.LLM(model=str(folder), **options)
        except Exception as error:  # vLLM raises whatever its configs, kernels and workers raise
            raise UserError(f"vLLM cannot load {config.model}: {reason_of(error)}") from error
        settings = self.llm.llm_engine.model_config
        self.context: int | None = settings.max_model_len - 1  # vLLM always generates one token
        self.rows: int | None = settings.get_vocab_size()
        self.made_with = {"engine": "vllm", "vllm": vllm.__version__, "torch": version("torch")}
        self._thread = ThreadPoolExecutor(1, "vllm")

    def start(self, batch: Sequence[Query], k: int) -> "Future[Distributions]":
        return self._thread.submit(self._distributions, batch, k)

    def _distributions(self, batch: Sequence[Query], k: int) -> Distributions:
        done: dict[int, Distributions] = {}
        asked = k
        while missing := [number for number in range(len(batch)) if number not in done]:
            more = 0
            for number, output in zip(missing, self._outputs([batch[n] for n in missing], asked), strict=True):
                query = batch[number]
                entries = (
                    {token: entry.logprob for token, entry in output.prompt_logprobs[position + 1].items()}
                    for position in query.positions.tolist()
                )
                try:
                    done[number] = reduced(query, entries, k, asked, self.known)
                except TooFewError as error:
                    more = max(more, error.absent)
                except ValueError as error:
                    raise UserError(f"vLLM gives {self.name}, {query.name}: {error}") from error
            asked = max(asked, k + more)
        return joined([done[number] for number in range(len(batch))])

    def _outputs(self, batch: Sequence[Query], k: int) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False)
        prompts = [{"prompt_token_ids": query.ids.tolist()} for query in batch]
        try:
            return self.llm.generate(prompts, parameters, use_tqdm=False)
        except Exception as error:
            message = f"vLLM stopped at {self.name}, {batch[0].name} and {len(batch) - 1} more: {reason_of(error)}"
            raise UserError(message) from error

    def why_not_finite(self) -> str:
        return "A wider --dtype may help"

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        with suppress(AttributeError):
            self.llm.llm_engine.engine_core.shutdown()
