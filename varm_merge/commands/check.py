"""``varm-merge check``: all that is wrong with a recipe, before weights are read."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from varm_common.console import talks
from varm_common.tables import size
from varm_merge.commands.flags import by_name_flag, merge_flags

__all__ = ["check"]


@click.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--offline", is_flag=True, help="Look at the recipe alone, not at its models.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the merge will be written: is there room?",
)
@talks(libraries=False)
@by_name_flag
@merge_flags
def check(
    recipes: tuple[Path, ...], as_json: bool, offline: bool, out: Path | None, by_name: bool, options: Any
) -> None:
    """Find all that is wrong with recipes of any merge method, before weights are read or downloaded.

    mergekit plans the merge from the configs and the headers of the weight files (for a model on the Hub, by HTTP
    ranges). transformers then shows whether the result would load. Memory, disk space and downloads are estimated.
    For targets in 16 bits, a sample of the weights is read to see how much of the fine-tune survived rounding.
    Exit code 0 if all recipes can be merged (with --out: and written there), else 1.

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
        for recipe, result in zip(recipes, results, strict=True):
            _print(recipe, result, offline)
    sys.exit(1 if any(result["problems"] for result in results) else 0)


def _checked(recipe: Path, offline: bool, out: Path | None, by_name: bool, options: Any) -> dict[str, Any]:
    """The problems, remarks and estimate of one recipe, as ``--json`` prints them."""
    from varm_common.errors import UserError
    from varm_merge.recipes import cost, rounding
    from varm_merge.recipes.check import check as problems_of
    from varm_merge.recipes.problems import Looked, Problem
    from varm_merge.recipes.recipe_file import read

    looked, text = Looked(), ""
    try:
        text = read(recipe)
        problems = problems_of(
            text,
            models=not offline,
            every=True,
            looked=looked,
            options=options,
            by_name=by_name,
            path=recipe,
            out=out,
        )
    except UserError as error:
        problems = [Problem(error.message, 1)]
    found: dict[str, Any] = {} if offline else looked.estimate
    if not problems and not offline:
        looked.remarks += rounding.remarks(text, looked)
    remarks = sorted(looked.remarks, key=lambda one: one.line)
    if found and not problems:
        found = cost.estimate(yaml.safe_load(text), looked, options.transformers_cache)
        remarks += [Problem(one, 1) for one in cost.shortages(found)]
    if out is not None:
        problems += [Problem(one, 1) for one in cost.obstacles(found, out)]
    listed = {name: [asdict(one) for one in some] for name, some in (("problems", problems), ("remarks", remarks))}
    return {"recipe": str(recipe), **listed, "estimate": found}


def _print(recipe: Path, result: dict[str, Any], offline: bool) -> None:
    for mark, colour, some in (("✗", "red", result["problems"]), ("!", "yellow", result["remarks"])):
        for one in some:
            click.secho(f"{mark} line {one['line']}: {one['message']}", fg=colour)
    if not result["problems"]:
        verdict = "is sound; its models were not looked at" if offline else "can be merged"
        click.secho(f"✓ {recipe} {verdict}", fg="green")
    for line in _told(result["estimate"]):
        click.echo(line)


def _told(found: dict[str, Any]) -> list[str]:
    """The estimate, a sentence a line."""
    if not found:
        return []
    sizes = {name: size(value) for name, value in found.items() if name.endswith("bytes")}
    lines = [
        f"{found['parameters']:,} parameters",
        f"reads {sizes['read_bytes']}, writes {sizes['written_bytes']}",
        f"the largest tensor of all models takes {sizes['largest_tensor_bytes']}",
    ]
    if found.get("download_bytes"):
        lines[1] += f", downloads {sizes['download_bytes']} first"
    if "memory_bytes" in found:
        lines.append(f"holds about {sizes['memory_bytes']} in memory at the peak")
    return lines
