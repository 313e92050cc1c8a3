"""The flags that all commands share, and how a command talks."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import click

__all__ = ["talks"]

Command = Callable[..., None]


def talks(command: Command) -> Command:
    """Give a command ``--quiet`` and ``--verbose``; it is called with ``quiet``, and nothing of the other.

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
        os.environ["TRANSFORMERS_VERBOSITY"] = "info" if verbose else "error"  # what matters we say ourselves
        level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
        logging.basicConfig(level=level, format="%(name)s: %(message)s", force=True)
        logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
        command(*arguments, quiet=quiet, **options)

    return talking
