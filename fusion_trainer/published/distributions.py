"""Published logits → the columns of a store.

The k largest logits alone do not say how much probability is outside of them. Where the cross-entropy of the next
token is published and that token is among the k, it follows: the logarithm of the normaliser is the token's logit
plus its cross-entropy. Elsewhere the tail is unknown (NaN), and the k probabilities sum to 1. If the logits are
log-probabilities already, the tail is always known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.alignment.align_row import put_all_on_gold
from fusion_trainer.alignment.map_distributions import fill
from fusion_trainer.published.rows import RowError, Values
from fusion_trainer.representations.store import Representation, id_dtype

__all__ = ["Codec", "are_normalised"]

LEAST = float(np.finfo(np.float16).min)
NOT_ALIGNED = 1.0
"""The only logit of a position that was not aligned."""
SLACK, RELATIVE = 0.02, 0.002
"""By how much a cross-entropy may lie below what the k largest logits allow: it is rounded to float16."""
NORMALISED = 0.5
Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class Codec:
    """How the distributions of one dataset are read.

    Attributes:
        k: Entries of each position.
        vocabulary: The tokenizer's ids.
        normalised: Whether the logits are log-probabilities.
    """

    k: int
    vocabulary: frozenset[int]
    normalised: bool

    @cached_property
    def size(self) -> int:
        """The highest id, and one."""
        return max(self.vocabulary) + 1

    @cached_property
    def _is_token(self) -> NDArray[np.bool_]:
        known = np.zeros(self.size + 1, bool)
        known[list(self.vocabulary)] = True
        return known

    def own(self, values: Values, positions: Integers, golds: Integers) -> tuple[dict[str, Any], int]:
        """The columns of the row's own model at some positions, and how many entries were no tokens.

        Args:
            values: The row's distributions.
            positions: int [P], of the row.
            golds: int [P], the ids that follow.

        Raises:
            RowError: They are not distributions, or contradict the cross-entropies.
        """
        logits_PK, ids_PK = values.at(positions, self.k)
        if not (finite_P := np.isfinite(logits_PK).all(1)).all():
            raise RowError(f"logits are NaN or infinite at token {positions[np.argmin(finite_P)]}")
        logits_PK, ids_PK, foreign = self._tokens_only(logits_PK, ids_PK)
        cross_entropies_P = values.per_step[positions]
        among_P, highest_P = _log_sum(logits_PK), logits_PK.max(1, initial=-np.inf)
        if not np.isfinite(highest_P).all():
            raise RowError(f"none of the ids at token {positions[np.argmin(np.isfinite(highest_P))]} is a token")
        is_gold_PK = ids_PK == golds[:, None]
        gold_P = np.where(is_gold_PK.any(1), np.where(is_gold_PK, logits_PK, 0.0).sum(1), np.nan)
        normaliser_P = np.zeros(len(positions)) if self.normalised else gold_P + cross_entropies_P
        allowed_P = SLACK + RELATIVE * np.abs(np.nan_to_num(cross_entropies_P))
        if (wrong := among_P - normaliser_P > allowed_P).any():
            at = int(np.argmax(wrong))
            what = f"the cross-entropy {cross_entropies_P[at]:.4g} of the next token contradicts its logit"
            if self.normalised:
                what = "the probabilities sum to more than 1"
            raise RowError(f"at token {positions[at]} {what}")
        known_P = np.isfinite(normaliser_P)
        normaliser_P = np.where(known_P, np.maximum(normaliser_P, among_P), among_P)
        tail_P = np.where(known_P, -np.expm1(np.minimum(among_P - normaliser_P, 0.0)), np.nan)
        otherwise_P = gold_P if self.normalised else np.full(len(positions), np.nan)
        gold_logprob_P = np.where(np.isfinite(cross_entropies_P), -cross_entropies_P, otherwise_P)
        logprobs_PK = np.maximum(logits_PK - normaliser_P[:, None], LEAST)
        return self._columns(logprobs_PK, ids_PK, tail_P, np.maximum(gold_logprob_P, LEAST)), foreign

    def aligned(
        self, values: Values, positions: Integers, golds: NDArray[np.int32], own: Representation, unpaired: str
    ) -> tuple[Representation, int]:
        """The row of an aligned source, and how many entries were no tokens.

        Args:
            values: The source's distributions in the pivot's ids.
            positions: int [P], of the row.
            golds: int [P], the ids that follow.
            own: The pivot's row, which takes the place of what is not aligned.
            unpaired: ``pivot``; or ``gold`` to put all probability on the next token instead.
        """
        logits_PK, ids_PK = values.at(positions, self.k)
        if (np.isnan(logits_PK) | np.isposinf(logits_PK)).any():
            raise RowError("the source's logits are NaN or infinite")
        single_P = np.isfinite(logits_PK).sum(1) == 1
        paired_P = np.isfinite(logits_PK).any(1) & ~(single_P & (logits_PK[:, 0] == NOT_ALIGNED))
        logits_PK, ids_PK, foreign = self._tokens_only(logits_PK[paired_P], ids_PK[paired_P])
        among_P = _log_sum(logits_PK)
        if not np.isfinite(among_P).all():
            raise RowError("none of the source's ids at some token is a token of the pivot")
        unknown_P = np.full(len(among_P), np.nan)
        normaliser_P = np.zeros(len(among_P)) if self.normalised else among_P
        tail_P = -np.expm1(np.minimum(among_P, 0.0)) if self.normalised else unknown_P
        columns = self._columns(logits_PK - normaliser_P[:, None], ids_PK, tail_P, unknown_P)
        row = replace(own, **{name: getattr(own, name).copy() for name in columns})
        for name, column in columns.items():
            getattr(row, name)[paired_P] = column
        if unpaired == "gold":
            put_all_on_gold(row, ~paired_P, golds)
        return replace(row, paired=paired_P.astype(np.uint8)), foreign

    def empty(self) -> dict[str, Any]:
        """The columns of no position."""
        nothing = np.zeros((0, self.k))
        return self._columns(nothing, nothing.astype(np.int64), np.zeros(0), np.zeros(0))

    def _tokens_only(self, logits_PK: Floats, ids_PK: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64], int]:
        """Entries in descending order, without ids that are no tokens: a model may have more rows than those."""
        there_PK = ids_PK >= 0
        known_PK = self._is_token[np.clip(ids_PK, 0, self.size)] & there_PK
        logits_PK, ids_PK = np.where(known_PK, logits_PK, -np.inf), np.where(known_PK, ids_PK, -1)
        order_PK = np.argsort(-logits_PK, 1, kind="stable")
        logits_PK = np.take_along_axis(logits_PK, order_PK, 1)
        ids_PK = np.take_along_axis(ids_PK, order_PK, 1)
        ascending_PK = np.sort(ids_PK, 1)
        if ((np.diff(ascending_PK, axis=1) == 0) & (ascending_PK[:, 1:] >= 0)).any():
            raise RowError("a distribution has an id twice")
        return logits_PK, ids_PK, int((there_PK & ~known_PK).sum())

    def _columns(
        self, logprobs_PK: Floats, ids_PK: NDArray[np.int64], tail_P: Floats, gold_logprob_P: Floats
    ) -> dict[str, Any]:
        fill(ids_PK)
        return {
            "ids": ids_PK.astype(id_dtype(self.size)),
            "logprobs": np.minimum(logprobs_PK, 0.0).astype(np.float16),
            "tail": tail_P.astype(np.float16),
            "gold_logprob": np.minimum(gold_logprob_P, 0.0).astype(np.float16),
        }


def are_normalised(rows: Sequence[Floats]) -> bool:
    """Whether logits are log-probabilities: k of them never sum to more than 1, and mostly to more than a half.

    Args:
        rows: Logits [positions, k] of some rows.
    """
    sums = np.concatenate([_log_sum(logits) for logits in rows])
    return bool(len(sums) and sums.max() <= SLACK and np.median(sums) >= np.log(NORMALISED))


def _log_sum(logits_PK: Floats) -> Floats:
    """The logarithm of the sum of exponentials at each position."""
    highest = logits_PK.max(1, keepdims=True, initial=-np.inf)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        sums: Floats = np.log(np.exp(logits_PK - highest).sum(1)) + highest[:, 0]
    return sums
