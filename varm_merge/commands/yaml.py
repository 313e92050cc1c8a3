"""``varm-merge yaml``: mergekit-yaml where start-up files are forbidden."""

from contextlib import nullcontext

import click

__all__ = ["yaml_command"]

AS_MERGEKIT_YAML = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@click.command("yaml", context_settings=AS_MERGEKIT_YAML)
@click.option("--by-name", is_flag=True, help="Merge the tensors of the base model by their names.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def yaml_command(by_name: bool, arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with `varm` registered by import.

    For environments where start-up files are forbidden. Takes the arguments of mergekit-yaml, and --by-name: then
    the tensors of the base model are merged by their names, whatever mergekit knows of its architecture.

    \b
    Examples:
      varm-merge yaml recipe.yaml out/ --cuda
      varm-merge yaml --by-name recipe.yaml out/
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml  # importing varm_merge has set the hook

    from varm_merge.merging import planning

    others = [argument for argument in arguments if argument != "--by-name"]  # it may stand after the recipe
    with planning.by_name() if by_name or len(others) < len(arguments) else nullcontext():
        mergekit_yaml.main(others, prog_name="varm-merge yaml")
