"""The result of a search as tables and sentences for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from varm_common.standard_errors import NOISE

__all__ = ["tables", "verdict"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """What was tried, best last; and the models on the conversations that chose nothing."""
    names = [one["name"] for one in report["numbers"] if one["searched"]]
    parts = report["conversations"]
    ranked = sorted(report["evaluations"], key=lambda one: -float(one["nats_per_byte"]))
    tried = [
        [*(f"{value:g}" for value in one["values"]), f"{one['nats_per_byte']:.5f}", signed(one["minus_best"])]
        for one in ranked
    ]
    title = f"tried on {parts['choosing']} conversations, best last"
    yield title, [*names, "nats/byte", "minus best"], tried
    models = [
        [one["name"], f"{one['nats_per_byte']:.5f}", "" if one["name"] == "tuned" else signed(one["tuned_minus"])]
        for one in report["models"]
    ]
    yield f"on {parts['reporting']} other conversations", ["model", "nats/byte", "tuned minus it"], models


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the tuned recipe is better than the given one on the reporting part."""
    difference, error = next(one["tuned_minus"] for one in report["models"] if one["name"] == "recipe")
    shown = signed([difference, error])
    if difference == 0:
        return "the recipe's own values are the best that were tried"
    if error is None or abs(difference) <= NOISE * error:
        return f"tuned minus recipe: {shown} nats per byte, which may be noise"
    return f"tuned minus recipe: {shown} nats per byte: {'better' if difference < 0 else 'worse'}"


def signed(difference: list[float | None]) -> str:
    """A difference and its standard error."""
    value, error = difference
    return f"{value:+.5f}" + ("" if error is None else f" ± {error:.5f}")
