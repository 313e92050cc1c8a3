"""The ``varm-merge`` program."""

import errno
import os
import sys
from contextlib import suppress
from typing import Any

import click

from varm_common import console
from varm_common.console import completion
from varm_merge.commands.check import check
from varm_merge.commands.compare import compare
from varm_merge.commands.doctor import doctor
from varm_merge.commands.evaluate import evaluate
from varm_merge.commands.inspect import inspect
from varm_merge.commands.push import push
from varm_merge.commands.tune import tune
from varm_merge.commands.yaml import yaml_command
from varm_merge.version import __version__

__all__ = ["main"]


class Program(console.Program):
    """Obeys NO_COLOR, and reports when standard output cannot be written (a full disk, for example)."""

    def invoke(self, context: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):
            context.color = False
        try:
            return super().invoke(context)
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG):
                raise
            with suppress(OSError, ValueError):  # Python would write the rest of the buffer and fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.ClickException(f"standard output cannot be written: {error.strerror}") from error


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="varm-merge")
def main() -> None:
    """Merge LLMs with mergekit and the merge method Variation Ratio Merge (VaRM).

    To merge, write `merge_method: varm` in a recipe and run `mergekit-yaml recipe.yaml out/`. The commands below
    check, inspect, compare, tune, evaluate and publish merges.

    Exit codes: 0: success. 1: a problem was found and printed, or Ctrl-C was pressed. 2: bad usage.
    """


for command in (check, inspect, compare, tune, doctor, yaml_command, completion("varm-merge"), push, evaluate):
    main.add_command(command)
