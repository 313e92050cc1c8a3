"""``varm-merge inspect``: show the weights without merging."""

import json
from pathlib import Path
from typing import Any, get_args

import click

from varm_common.console import talks
from varm_common.tables import show
from varm_merge.commands.flags import WRITTEN, merge_flags, option, with_by_name, with_json
from varm_merge.merging.weights import Granularity

__all__ = ["inspect"]


@click.command()
@click.argument("recipe", type=click.Path(exists=True, path_type=Path))
@option(
    "--granularity",
    "granularities",
    multiple=True,
    type=click.Choice(get_args(Granularity)),
    help="Granularity to show in addition to the recipe's own; may be repeated. Default: all five.",
)
@with_json
@option("--html", type=WRITTEN, help="Write everything as one page that works offline.")
@option("--png", type=WRITTEN, help="Draw the merge weights at the last --granularity, or at the recipe's own.")
@option(
    "--top", type=click.IntRange(min=0), default=5, help="How many of the most and least moved tensors to list."
)
@option("--device", default="cpu", help="Device on which tensors are measured.")
@talks(libraries=False)
@with_by_name
@merge_flags
def inspect(
    recipe: Path, granularities: tuple[str, ...], html: Path | None, png: Path | None, quiet: bool, **settings: Any
) -> None:
    """Show the merge weights that a `varm` recipe would give, without merging.

    RECIPE is a recipe, or the result of a merge by varm: the model's folder, or its varm_weights.json. Exit code 1
    if the recipe cannot be merged.

    \b
    Examples:
      varm-merge inspect recipe.yaml
      varm-merge inspect recipe.yaml --granularity layer --json > weights.json
      varm-merge inspect recipe.yaml --html weights.html
      varm-merge inspect recipe.yaml --granularity module --png weights.png
      varm-merge inspect merged/ --html weights.html
    """
    from varm_common.files import demand_place
    from varm_merge.inspection import heatmap, measure
    from varm_merge.inspection import html as inspection_page
    from varm_merge.inspection.tables import tables

    for path in filter(None, (html, png)):  # found out before hours of measuring
        demand_place(path)
    options = settings["options"].model_copy(update={"device": settings["device"], "quiet": quiet})
    inspection = measure.inspect(recipe, options, granularities, by_name=settings["by_name"])
    if png is not None:
        heatmap.draw(inspection, granularities[-1] if granularities else measure.RECIPE, png)
    if html is not None:
        inspection_page.draw(inspection, html)
    if settings["as_json"]:
        click.echo(json.dumps(inspection, indent=1))
        return
    for table in tables(inspection, settings["top"]):
        show(*table)
    for remark in inspection.get("remarks", ()):
        click.secho(f"! {remark}", fg="yellow", err=True)
