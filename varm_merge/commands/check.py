"""``varm-merge check``: all that is wrong with a recipe, before weights are read."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

__all__ = ["check"]


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Of models from the Hub.")
@click.option("--offline", is_flag=True, help="Look at the recipe alone, not at its models.")
def check(recipe: Path, as_json: bool, cache_dir: str | None, offline: bool) -> None:
    """Find all that is wrong with a recipe of any merge method, before weights are read or downloaded.

    Of the models only configs and safetensors headers are read; of a model on the Hub by HTTP ranges.
    Exit code 0 if it can be merged, 1 if not.

    \b
    Examples:
      varm-merge check recipe.yaml
      varm-merge check recipe.yaml --json
    """
    from varm_merge.recipe import Looked
    from varm_merge.recipe import check as problems_of

    looked = None if offline else Looked()
    text = recipe.read_text(encoding="utf-8", errors="replace")
    problems = problems_of(text, models=not offline, cache_dir=cache_dir, every=True, looked=looked)
    remarks = sorted(looked.remarks, key=lambda one: one.line) if looked else []
    estimate = looked.estimate if looked else {}
    if as_json:
        told = {
            name: [asdict(one) for one in some] for name, some in (("problems", problems), ("remarks", remarks))
        }
        click.echo(json.dumps({"recipe": str(recipe), **told, "estimate": estimate}, indent=1))
    else:
        for mark, colour, some in (("✗", "red", problems), ("!", "yellow", remarks)):
            for one in some:
                click.secho(f"{mark} line {one.line}: {one.message}", fg=colour)
        if not problems:
            verdict = "is sound; its models were not looked at" if offline else "can be merged"
            click.secho(f"✓ {recipe} {verdict}", fg="green")
        if estimate:
            sizes = {name: f"{value / 1e9:.3g} GB" for name, value in estimate.items() if name.endswith("bytes")}
            click.echo(f"if as large as its base: {estimate['parameters']:,} parameters")
            click.echo(f"reads {sizes['read_bytes']}, writes {sizes['written_bytes']}")
            click.echo(f"the largest tensor of all models takes {sizes['largest_tensor_bytes']}")
    sys.exit(1 if problems else 0)
