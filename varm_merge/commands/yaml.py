"""``varm-merge yaml``: mergekit-yaml where start-up files are forbidden."""

from contextlib import nullcontext

import click

__all__ = ["yaml_command"]

AS_MERGEKIT_YAML = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
HELP = {"-h", "--help"}


@click.command("yaml", context_settings=AS_MERGEKIT_YAML)
@click.option("--by-name", is_flag=True, help="Merge every tensor of the base model by its name.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def yaml_command(context: click.Context, by_name: bool, arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with `varm`, without a .pth file.

    Use it where .pth files are forbidden. It takes the ARGUMENTS of mergekit-yaml, which are listed below, and
    --by-name.

    \b
    Examples:
      varm-merge yaml recipe.yaml out/ --cuda
      varm-merge yaml --by-name recipe.yaml out/
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml  # importing varm_merge has set the hook

    from varm_merge.merging import planning

    if HELP.intersection(arguments):
        click.echo(f"{context.get_help()}\n")
        arguments = ("--help",)
    others = [argument for argument in arguments if argument != "--by-name"]  # it may stand after the recipe
    with planning.by_name() if by_name or len(others) < len(arguments) else nullcontext():
        mergekit_yaml.main(others, prog_name="varm-merge yaml")
