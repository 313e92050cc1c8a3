"""``varm-merge yaml``: mergekit-yaml where start-up files are forbidden."""

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
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def yaml_command(arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with `varm` registered by import.

    For environments where start-up files are forbidden. Takes what mergekit-yaml takes.

    \b
    Example:
      varm-merge yaml recipe.yaml out/ --cuda
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml  # importing varm_merge has set the hook

    mergekit_yaml.main(list(arguments), prog_name="varm-merge yaml")
