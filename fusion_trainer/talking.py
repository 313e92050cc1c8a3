"""The flags that all commands share, and how a command talks."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import get_completion_class

__all__ = ["completion", "is_quiet", "talks"]

Command = Callable[..., None]


def talks(command: Command) -> Command:
    """Give a command ``--quiet`` and ``--verbose``.

    Quiet: no progress bars, and of the libraries' messages errors alone. Verbose: what the libraries tell about
    their work, on stderr. Both hold for the programs that a command starts, too: they are set in the environment,
    which tqdm, transformers and huggingface_hub read when they are imported.
    """

    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @click.option("-v", "--verbose", is_flag=True, help="Tell on stderr what the libraries do.")
    @functools.wraps(command)
    def talking(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        if quiet:
            os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if quiet or verbose:
            os.environ["TRANSFORMERS_VERBOSITY"] = "info" if verbose else "error"
            logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
        command(*arguments, **options)

    return talking


def is_quiet() -> bool:
    """Whether progress is not to be shown, by ``--quiet`` or by tqdm's own variable."""
    return bool(os.environ.get("TQDM_DISABLE"))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what completes this program's commands and options in SHELL.

    \b
    Example, for the running shell and for all to come:
      eval "$(fusion-trainer completion bash)"
      fusion-trainer completion bash >> ~/.bashrc
    """
    program = context.find_root()
    name = str(program.info_name)
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"  # click's own
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(program.command, {}, name, variable).source())
