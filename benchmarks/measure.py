"""What the benchmarks share: measuring in rounds, the verdict on a budget, and the report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import TypeVar

import click

from varm_common.process_usage import machine, measured, spread
from varm_common.tables import markdown as table

__all__ = [
    "judged",
    "machine",
    "measure_rounds",
    "measured",
    "publish",
    "rotated",
    "sections",
    "spread",
    "table",
    "verdict",
]

Result = TypeVar("Result")


def verdict(values: Sequence[float], limit: float) -> str:
    """A budget is judged by the median."""
    return "met" if median(values) <= limit else "NOT met"


def judged(values: Sequence[float], budget: float | None, unit: str = "") -> tuple[str, str]:
    """The cells of a budget and its verdict; empty without a budget."""
    return ("", "") if budget is None else (f"≤ {budget}{unit}", verdict(values, budget))


def rotated(legs: Iterable[str], number: int) -> list[str]:
    """The legs in the order of a round: each round begins with another one."""
    legs = [*legs]
    first = number % len(legs)
    return legs[first:] + legs[:first]


def measure_rounds(
    legs: Mapping[str, Callable[[], Result]], rounds: int, shown: Callable[[Result], str]
) -> dict[str, list[Result]]:
    """The results of each leg, round by round, after a warm-up round that does not count."""
    results: dict[str, list[Result]] = {leg: [] for leg in legs}
    for number in range(rounds + 1):
        for leg in rotated(legs, number):
            result = legs[leg]()
            click.echo(f"{f'round {number}' if number else 'warm-up'}: {leg} {shown(result)}", err=True)
            if number:
                results[leg].append(result)
    return results


def sections(bodies: Iterable[tuple[str, str]]) -> str:
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in bodies)


def publish(name: str, title: str, *paragraphs: str, save: bool) -> str:
    """Print a report; with ``save`` also write benchmarks/results/YYYY-MM-DD-NAME.md."""
    text = "\n\n".join([f"# {title}, {date.today()}", *paragraphs]) + "\n"
    click.echo(text)
    if save:
        (Path(__file__).parent / "results" / f"{date.today()}-{name}.md").write_text(text, encoding="utf-8")
    return text
