"""``varm-merge check``: every problem of a recipe, before weights are read."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from varm_common.console import talks
from varm_common.tables import size
from varm_merge.commands.flags import NEW_FOLDER, READ, flag, merge_flags, option, with_by_name, with_json

__all__ = ["check"]


@click.command()
@click.argument("recipes", nargs=-1, required=True, type=READ)
@with_json
@flag("--offline", help="Check only the recipe; read no model and use no network.")
@option("--out", type=NEW_FOLDER, help="Folder where the merge will be written; checks its free space.")
@talks(libraries=False)
@with_by_name
@merge_flags
def check(
    recipes: tuple[Path, ...], as_json: bool, offline: bool, out: Path | None, by_name: bool, options: Any
) -> None:
    """Check recipes of any merge method, before model weights are read or downloaded.

    mergekit plans the merge from the configs and the headers of the weight files (for a model on the Hub, by HTTP
    ranges). transformers then shows whether the result would load. Memory, disk space and downloads are estimated.
    For targets in 16 bits, a sample of the weights is read to see how much of the fine-tune survived rounding.
    Exit code 0 if all recipes can be merged (with --out: and the results can be written there), else 1.

    \b
    Examples:
      varm-merge check recipe.yaml
      varm-merge check recipe.yaml --out /data/out
      varm-merge check yaml_recipes/*.yaml --offline
      varm-merge check recipe.yaml --json
    """
    results = [_checked(recipe, offline, out, by_name, options) for recipe in recipes]
    if as_json:
        click.echo(json.dumps(results if results[1:] else results[0], indent=1))
    else:
        for result in results:
            _print(result, offline)
    sys.exit(1 if any(result["problems"] for result in results) else 0)


def _checked(recipe: Path, offline: bool, out: Path | None, by_name: bool, options: Any) -> dict[str, Any]:
    """The problems, remarks and estimate of one recipe, as ``--json`` prints them."""
    import yaml

    from varm_common.errors import UserError
    from varm_merge.recipes import cost
    from varm_merge.recipes.check import check as problems_of
    from varm_merge.recipes.problems import Looked, Problem
    from varm_merge.recipes.recipe_file import read

    looked, text = Looked(), ""
    try:
        text = read(recipe)
        flags = {"every": True, "models": not offline, "options": options, "by_name": by_name}
        problems = problems_of(text, looked=looked, path=recipe, out=out, **flags)
    except UserError as error:
        problems = [Problem(error.message, 1)]
    remarks, sizes = looked.remarks, looked.estimate
    if not problems and not offline:
        from varm_merge.recipes import rounding

        remarks += rounding.remarks(text, looked)
    remarks.sort(key=lambda remark: remark.line)
    if sizes and not problems:
        sizes = cost.estimate(yaml.safe_load(text), looked, options.transformers_cache)
        remarks += [Problem(message, 1) for message in cost.shortages(sizes)]
    if out is not None:
        problems += [Problem(message, 1) for message in cost.obstacles(sizes, out)]
    return {
        "recipe": str(recipe),
        "problems": [asdict(problem) for problem in problems],
        "remarks": [asdict(remark) for remark in remarks],
        "estimate": sizes,
    }


def _print(result: dict[str, Any], offline: bool) -> None:
    for mark, colour, kind in (("✗", "red", "problems"), ("!", "yellow", "remarks")):
        for item in result[kind]:
            click.secho(f"{mark} line {item['line']}: {item['message']}", fg=colour)
    if not result["problems"]:
        verdict = "has no problems; its models were not checked" if offline else "can be merged"
        click.secho(f"✓ {result['recipe']} {verdict}", fg="green")
    estimate = result["estimate"]
    if not estimate:
        return
    sizes = {name: size(value) for name, value in estimate.items() if name.endswith("bytes")}
    downloads = f", downloads {sizes['download_bytes']} first" if estimate.get("download_bytes") else ""
    click.echo(f"{estimate['parameters']:,} parameters")
    click.echo(f"reads {sizes['read_bytes']}, writes {sizes['written_bytes']}{downloads}")
    click.echo(f"the largest tensor of all models takes {sizes['largest_tensor_bytes']}")
    if "memory_bytes" in estimate:
        click.echo(f"holds about {sizes['memory_bytes']} in memory at the peak")
