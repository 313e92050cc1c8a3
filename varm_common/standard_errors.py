"""Standard errors of scores: of one model, and of the difference between two models on the same conversations.

A score is a ratio of sums (nats per byte, matched answers per row). Its error is the linearised (Taylor)
variance of a ratio, from the residual of each conversation. The conversation is the sampled unit: its blocks are
not independent and count as one. Two models are compared conversation by conversation, so what is hard for both
cancels out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOISE", "difference", "standard_error"]

NOISE = 2.0
"""A difference of up to so many standard errors counts as noise (95% of the differences between equal models)."""

Sums = tuple[Sequence[float], Sequence[float]]
"""Numerators and denominators, one of each per conversation."""


def standard_error(score: Sums) -> float | None:
    """The error of ``sum(numerators) / sum(denominators)``; None for fewer than two conversations."""
    return _spread(_residuals(score))


def difference(first: Sums, second: Sums) -> tuple[float, float | None]:
    """The first score minus the second, and its standard error. Both have the same conversations in one order."""
    return _ratio(first) - _ratio(second), _spread(_residuals(first) - _residuals(second))


def _ratio(score: Sums) -> float:
    return float(np.sum(score[0]) / np.sum(score[1]))


def _residuals(score: Sums) -> NDArray[np.float64]:
    numerators, denominators = (np.asarray(part, np.float64) for part in score)
    return np.asarray((numerators - _ratio(score) * denominators) / denominators.sum())


def _spread(residuals: NDArray[np.float64]) -> float | None:
    number = len(residuals)
    return float(np.sqrt(number / (number - 1) * np.square(residuals).sum())) if number > 1 else None
