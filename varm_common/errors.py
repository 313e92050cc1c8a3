"""The one kind of error that a user can cause."""

from collections.abc import Mapping, Sequence

import click

SHOWN = 20
"""How many problems of one kind are listed before the rest is only counted."""


class UserError(click.ClickException, ValueError):
    """What is wrong, where, and what to do next, in words for the person who runs the program.

    A ``ValueError`` for callers in Python; inside a command it ends the program with ``Error: …`` and exit
    code 1 instead of a traceback.
    """


VarmError = FusionError = UserError
"""Earlier names."""


def listed(problems: Sequence[str]) -> str:
    """The problems one below the other, indented; beyond ``SHOWN`` only their number."""
    lines = [f"\n  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"\n  … and {len(problems) - SHOWN} more")
    return "".join(lines)


def unlike(what: str, wanted: Mapping[str, object], found: Mapping[str, object]) -> str | None:
    """A table of the keys in which two descriptions differ, their values side by side; None if they agree."""
    keys = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if not keys:
        return None
    rows = [("", "wanted", "found"), *((key, str(wanted.get(key)), str(found.get(key))) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return what + "".join(f"\n  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
