"""``varm-merge yaml``: mergekit-yaml where start-up files are forbidden."""

from contextlib import nullcontext

import click

__all__ = ["yaml_command"]


@click.command(
    "yaml",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
)
@click.option("--by-name", is_flag=True, help="Merge the tensors of the base model by their names.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def yaml_command(by_name: bool, arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with `varm` registered by import.

    For environments where start-up files are forbidden. Takes what mergekit-yaml takes, and --by-name: the tensors
    of the base model are then merged by their names, whatever mergekit knows of its architecture.

    \b
    Examples:
      varm-merge yaml recipe.yaml out/ --cuda
      varm-merge yaml --by-name recipe.yaml out/
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml  # importing varm_merge has set the hook

    from varm_merge.merging import planning

    others = [argument for argument in arguments if argument != "--by-name"]  # it may stand behind the recipe, too
    with planning.by_name() if by_name or len(others) < len(arguments) else nullcontext():
        mergekit_yaml.main(others, prog_name="varm-merge yaml")
