"""Tables: by rich on a terminal, as plain columns in a pipe or file, as Markdown in a report."""

import sys
from collections.abc import Iterable, Sequence

import click

__all__ = ["markdown", "short_names", "show", "size"]


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; nothing if it has no rows. The first column is flush left, the others flush right."""
    lines = [header, *rows]
    if len(lines) == 1:
        return
    if sys.stdout and sys.stdout.isatty():  # it may be closed: `>&-`
        _show_on_terminal(title, lines)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    click.echo(f"\n{title}")
    for first, *others in lines:
        cells = map(str.rjust, others, widths[1:])
        click.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (header, tuple("-" * width for width in widths), *rows)
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def size(number: float) -> str:
    """A number of bytes with a unit: ``1.5 GB``."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def short_names(models: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """For each model the fewest last parts of its path that differ from those of the others and from ``taken``."""
    used = set(taken)
    parts = [model.rstrip("/").split("/") for model in models]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names) and not used.intersection(names):
            return names
    return list(models)


def _show_on_terminal(title: str, lines: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # unlike a str, it takes brackets as they are

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    Console().print(table)
