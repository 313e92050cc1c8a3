"""``varm-merge completion``: commands and options completed by the shell."""

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what completes this program's commands and options in SHELL.

    \b
    Example, for the running shell and for all to come:
      eval "$(varm-merge completion bash)"
      varm-merge completion bash >> ~/.bashrc
    """
    program = context.find_root()
    name = str(program.info_name)
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"  # click's own
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(program.command, {}, name, variable).source())
