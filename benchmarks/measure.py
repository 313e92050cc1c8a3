"""What the benchmarks share: the package's measuring of commands, and the verdict on a budget."""

from collections.abc import Sequence
from statistics import median

from varm_common.process_usage import CommandError, Run, machine, measured, spread
from varm_common.tables import markdown as table

__all__ = ["CommandError", "Run", "machine", "measured", "spread", "table", "verdict"]


def verdict(values: Sequence[float], limit: float) -> str:
    """A budget is judged by the median."""
    return "met" if median(values) <= limit else "NOT met"
