"""The ``varm-merge`` program."""

import errno
import os
import sys
from contextlib import suppress
from typing import Any

import click

from varm_common.console import completion
from varm_merge.commands.check import check
from varm_merge.commands.compare import compare
from varm_merge.commands.doctor import doctor
from varm_merge.commands.evaluate import evaluate
from varm_merge.commands.inspect import inspect
from varm_merge.commands.push import push
from varm_merge.commands.yaml import yaml_command
from varm_merge.version import __version__

__all__ = ["main"]


class Program(click.Group):
    """Obeys NO_COLOR, and says what keeps it from printing."""

    def invoke(self, context: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):
            context.color = False
        try:
            return super().invoke(context)
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG):
                raise
            with suppress(OSError, ValueError):  # what is still buffered would fail once more when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.ClickException(f"standard output cannot be written: {error.strerror}") from error


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="varm-merge")
def main() -> None:
    """Merge LLMs by Variation Ratio Merge (VaRM), inside stock mergekit.

    The merge itself needs no program of ours: write `merge_method: varm` in a recipe and run
    `mergekit-yaml recipe.yaml out/`.

    Exit codes: 0 done, and nothing is wrong; 1 something is wrong, and said, or stopped by Ctrl-C; 2 the command
    line is wrong.
    """


main.add_command(check)
main.add_command(inspect)
main.add_command(compare)
main.add_command(doctor)
main.add_command(yaml_command)
main.add_command(completion("varm-merge"))
main.add_command(push)
main.add_command(evaluate)
