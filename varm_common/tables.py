"""Tables on a terminal, as plain columns where a program or a file reads them, and sizes in them."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

__all__ = ["short_names", "show", "size"]


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: the first column flush left, the others flush right."""
    lines = [[*header], *([*row] for row in rows)]
    if len(lines) == 1:
        return
    if sys.stdout.isatty():
        _rich(title, lines)
        return
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    click.echo(f"\n{title}")
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        click.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def size(number: float) -> str:
    """A number of bytes in the unit that reads best."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g} {units[0]}"


def short_names(targets: Sequence[str]) -> list[str]:
    """The last parts of the targets' paths, if they tell them apart."""
    short = [Path(target).name for target in targets]
    return short if len(set(short)) == len(short) else list(targets)


def _rich(title: str, lines: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # in which brackets are no markup

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    Console().print(table)
