"""What an extraction needs of an inference engine: texts and positions in, top-k distributions out.

An engine computes; ``extraction`` does everything else: tokens, shards, resuming, the store. ``engines.py`` lists
the engines, and ``docs/extending.md`` shows how to add one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from varm_common.errors import UserError

__all__ = ["Distributions", "Engine", "EngineStoppedError", "Pending", "Query"]


class EngineStoppedError(UserError):
    """The engine gives no more answers for now. What it has answered is kept, and the same command resumes."""


@dataclass(frozen=True)
class Query:
    """A text, and where it is queried.

    Attributes:
        ids: int32 [tokens].
        positions: int32 [S], ascending, each before the last token. At each, the distribution that predicts the
            next token is wanted.
        name: Where the text comes from, for messages.
    """

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    name: str


@dataclass(frozen=True)
class Distributions:
    """The distributions at the S positions of a batch's texts, one text after the other.

    Attributes:
        ids: Integers [S, k], descending in probability; only ids that stand for a token.
        logprobs: Floating [S, k], natural logarithms, normalised over the whole vocabulary.
        tail: Floating [S], the probability outside the k.
        gold_logprob: Floating [S], log-probability of the token that really follows.
    """

    ids: NDArray[Any]
    logprobs: NDArray[Any]
    tail: NDArray[Any]
    gold_logprob: NDArray[Any]


class Pending(Protocol):
    """A batch that is being computed, such as a ``concurrent.futures.Future``."""

    def done(self) -> bool:
        """Whether ``result`` returns without waiting."""

    def result(self) -> Distributions:
        """Wait for the distributions.

        Raises:
            EngineStoppedError: The engine cannot be reached any more.
            UserError: This batch cannot be computed.
        """


class Engine(Protocol):
    """A loaded model, or a server that has one.

    Attributes:
        context: The longest text in tokens; the rest of a longer text is cut off. None if there is no limit.
        rows: How many ids the model knows; None if the engine does not tell.
        batch_tokens: The largest batch, in tokens with padding. A text that is longer is a batch of its own.
        ahead: How many batches may be computed at the same time.
        made_with: Names and versions for the store's manifest; they affect rounding only.
    """

    context: int | None
    rows: int | None
    batch_tokens: int
    ahead: int
    made_with: dict[str, str]

    def start(self, batch: Sequence[Query], k: int) -> Pending:
        """Begin to compute a batch; every query has at least one position."""

    def why_not_finite(self) -> str:
        """A sentence that says why a distribution may be NaN or infinite."""

    def close(self) -> None:
        """Stop what is still being computed."""
