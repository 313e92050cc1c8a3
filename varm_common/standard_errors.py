"""How far a score may be off by chance: standard errors over conversations, of one model or of two paired.

A score is a ratio of sums (nats per byte, answers matched per row), so its error is that of a ratio: the
linearised (Taylor) variance, from the residual of each conversation. A conversation is the unit that was drawn:
its blocks are not independent, and count as one. Two models are compared on the same conversations, pair by pair:
what makes a text hard for both drops out of their difference.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOISE", "difference", "standard_error"]

NOISE = 2.0
"""Standard errors up to which a difference counts as chance (about 95% of the differences between equals)."""

Sums = tuple[Sequence[float], Sequence[float]]
"""Numerators and denominators, an entry for each conversation."""


def standard_error(score: Sums) -> float | None:
    """Of ``sum(numerators) / sum(denominators)``; None of fewer than two conversations."""
    return _spread(_residuals(score))


def difference(one: Sums, other: Sums) -> tuple[float, float | None]:
    """The first score less the second, and the standard error of the difference; entries are paired by place."""
    return _ratio(one) - _ratio(other), _spread(_residuals(one) - _residuals(other))


def _ratio(score: Sums) -> float:
    return float(np.sum(score[0]) / np.sum(score[1]))


def _residuals(score: Sums) -> NDArray[np.float64]:
    top, bottom = (np.asarray(part, np.float64) for part in score)
    return np.asarray((top - _ratio(score) * bottom) / bottom.sum())


def _spread(residuals: NDArray[np.float64]) -> float | None:
    number = len(residuals)
    return float(np.sqrt(number / (number - 1) * np.square(residuals).sum())) if number > 1 else None
