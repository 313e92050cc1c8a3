"""The result of a search as tables and sentences for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from varm_common.standard_errors import NOISE

__all__ = ["tables", "verdict"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """What was tried, best last; and the models on the conversations that chose nothing."""
    names = [number["name"] for number in report["numbers"] if number["searched"]]
    parts = report["conversations"]
    tried = [
        [*(f"{value:g}" for value in row["values"]), f"{row['nats_per_byte']:.5f}", signed(row["minus_best"])]
        for row in sorted(report["evaluations"], key=lambda row: -float(row["nats_per_byte"]))
    ]
    yield f"tried on {parts['choosing']} conversations, best last", [*names, "nats/byte", "minus best"], tried
    models = [
        [row["name"], f"{row['nats_per_byte']:.5f}", "" if row["name"] == "tuned" else signed(row["tuned_minus"])]
        for row in report["models"]
    ]
    yield f"on {parts['reporting']} other conversations", ["model", "nats/byte", "tuned minus it"], models


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the tuned recipe is better than the given one on the reporting part."""
    difference, error = next(row["tuned_minus"] for row in report["models"] if row["name"] == "recipe")
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
