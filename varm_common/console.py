"""What both programs share: how they write, ``--quiet`` and ``--verbose``, and shell completion."""

import functools
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.shell_completion import get_completion_class

__all__ = ["Program", "completion", "is_quiet", "no_logs", "talks"]

Command = Callable[..., None]


class Program(click.Group):
    """Writes ``?`` for a character that the encoding of standard output lacks."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")
        return super().main(*arguments, **settings)


def talks(*, libraries: bool = True) -> Callable[[Command], Command]:
    """Add ``--quiet`` and ``--verbose`` to a command. A command with a parameter ``quiet`` receives it.

    Both also apply to the programs that a command starts: they are set in the environment, which tqdm,
    transformers and huggingface_hub read when they are imported.

    Args:
        libraries: Whether the libraries report as they do by default when neither flag is given. If False, they
            report only warnings.
    """

    def decorate(command: Command) -> Command:
        wants_quiet = "quiet" in inspect.signature(command).parameters

        @click.option("-q", "--quiet", is_flag=True, help="Hide progress.")
        @click.option("-v", "--verbose", is_flag=True, help="Print the messages of the libraries on stderr.")
        @functools.wraps(command)
        def talking(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> None:
            if quiet and verbose:
                raise click.UsageError("give --quiet or --verbose, not both")
            if quiet:
                os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            if quiet or verbose or not libraries:
                os.environ["TRANSFORMERS_VERBOSITY"] = "info" if verbose else "error"
                level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
                logging.basicConfig(level=level, format="%(name)s: %(message)s", force=not libraries)
            if not libraries:
                logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
            command(*arguments, **({"quiet": quiet} if wants_quiet else {}), **options)

        return talking

    return decorate


def is_quiet() -> bool:
    """Whether progress is hidden, by ``--quiet`` or by tqdm's own variable."""
    return bool(os.environ.get("TQDM_DISABLE"))


@contextmanager
def no_logs() -> Iterator[None]:
    """Without the log messages and warnings of the libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def completion(program: str) -> click.Command:
    """The command ``completion`` of a program."""
    example = f"{program} completion bash"
    help_text = (
        "Print the script that completes commands and options in SHELL.\n\n\b\nExamples, for this shell "
        f'and for all later ones:\n  eval "$({example})"\n  {example} >> ~/.bashrc'
    )

    @click.command(name="completion", help=help_text)
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    @click.pass_context
    def command(context: click.Context, shell: str) -> None:
        root = context.find_root()
        name = str(root.info_name)
        shell_class = get_completion_class(shell)
        assert shell_class is not None
        variable = f"_{name.replace('-', '_').upper()}_COMPLETE"  # the name that click expects
        click.echo(shell_class(root.command, {}, name, variable).source())

    return command
