"""What to try next: Brent's method with golden section for one number, Nelder and Mead's simplex for several."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from varm_merge.tuning.parameters import Number

__all__ = ["Values", "search"]

Values = tuple[float, ...]
"""A value for each number that is searched."""

DIGITS = 4
"""Significant digits of a value that is tried."""
TOLERANCE = 0.005
"""The search ends when it moves by less than this share of the range."""
LOSS_TOLERANCE = 1e-5
"""The simplex also has to differ by less than this, in nats per byte."""
LARGE = 1e3
"""Stands for an infinite loss, with which an optimiser cannot calculate."""
FIRST_STEP, LEAST_STEP = 0.25, 0.025
"""Size of the first simplex, as a share of the range. On a linear scale it is half the recipe's value, within
these limits."""


class _Spent(Exception):  # noqa: N818  no error: it ends the search
    """All evaluations were made."""


@dataclass(frozen=True)
class _Axis:
    """The scale on which a number is searched, from 0 to 1: logarithmic if its range lies above 0."""

    low: float
    high: float

    def to_value(self, position: float) -> float:
        position = min(max(position, 0.0), 1.0)
        if self.low > 0:
            value = self.low * (self.high / self.low) ** position
        else:
            value = self.low + (self.high - self.low) * position
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def to_position(self, value: float) -> float:
        if self.low > 0:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def search(numbers: Sequence[Number], loss: Callable[[Values], float], evaluations: int) -> dict[Values, float]:
    """The loss of every set of values that was tried, in order. The first are those of the recipe.

    The search depends on nothing but the losses: where these are known already, it repeats itself.

    Args:
        numbers: What is searched, all of them free.
        loss: To be minimised; called once for the same values. Infinite where there is none.
        evaluations: How often at most.
    """
    from scipy import optimize

    tried: dict[Values, float] = {}
    axes = [_Axis(number.parameter.low, number.parameter.high) for number in numbers]

    def at(values: Values) -> float:
        if values not in tried:
            if len(tried) >= evaluations:
                raise _Spent
            tried[values] = loss(values)
        return tried[values]

    def at_positions(positions: Sequence[float]) -> float:
        values = tuple(axis.to_value(float(position)) for axis, position in zip(axes, positions, strict=True))
        return min(at(values), LARGE)

    limits = {"xatol": TOLERANCE, "maxiter": 10 * evaluations}
    with suppress(_Spent):
        at(tuple(number.start for number in numbers))
        if len(numbers) == 1:
            optimize.minimize_scalar(
                lambda position: at_positions([position]), bounds=(0.0, 1.0), method="bounded", options=limits
            )
        else:
            first = [axis.to_position(number.start) for axis, number in zip(axes, numbers, strict=True)]
            simplex = [first, *([*first] for _ in numbers)]
            for index, (axis, corner) in enumerate(zip(axes, simplex[1:], strict=True)):
                step = FIRST_STEP if axis.low > 0 else min(max(corner[index] / 2, LEAST_STEP), FIRST_STEP)
                corner[index] += step if corner[index] < 1 - step else -step
            bounds = [(0.0, 1.0)] * len(numbers)
            options = {**limits, "initial_simplex": simplex, "fatol": LOSS_TOLERANCE}
            optimize.minimize(at_positions, first, method="Nelder-Mead", bounds=bounds, options=options)
    return tried
