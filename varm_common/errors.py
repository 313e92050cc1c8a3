"""The error that a user can cause, and the texts that its messages are made of."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import click

__all__ = ["SHOWN", "UserError", "closest", "demand_same", "did_you_mean", "listed", "reason_of", "some"]

SHOWN = 20
"""How many problems a message lists. The rest are counted."""


class UserError(click.ClickException, ValueError):
    """Says what is wrong, where, and what to do next.

    A command that raises it ends with ``Error: …`` and exit code 1, without a traceback. Python code can catch it
    as a ``ValueError``.
    """


VarmError = FusionError = UserError
"""Earlier names."""


def listed(problems: Sequence[str]) -> str:
    """The problems, an indented line each. Beyond ``SHOWN`` only their number."""
    lines = [f"\n  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"\n  … and {len(problems) - SHOWN} more")
    return "".join(lines)


def some(names: Sequence[str]) -> str:
    """The first three names of a list, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason_of(error: Exception) -> str:
    """The error on one line. Its type is added where its text may be a bare key or value."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt word was meant to be; None if none is like it."""
    names = list(known)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    return next(iter(swapped or get_close_matches(word, names, 1)), None)


def did_you_mean(word: str, known: Iterable[str], *, list_known: bool = False) -> str:
    """``; did you mean `matrix`?`` for a misspelt word. If no known word is like it: empty, or a list of all."""
    names = list(known)
    if similar := closest(word, names):
        return f"; did you mean `{similar}`?"
    return f"; known are {', '.join(names)}" if list_known else ""


def demand_same(title: str, wanted: Mapping[str, object], actual: Mapping[str, object], remedy: str = "") -> None:
    """Check that two mappings agree.

    Raises:
        UserError: They differ. It has the title, a table of the keys that differ with both values, and the remedy.
    """
    keys = [key for key in {**wanted, **actual} if wanted.get(key) != actual.get(key)]
    if not keys:
        return
    rows = [("", "wanted", "found"), *((key, str(wanted.get(key)), str(actual.get(key))) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = "".join(f"\n  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
    raise UserError(title + table + (f"\n{remedy}" if remedy else ""))
