"""``varm-merge check``: all that is wrong with a recipe, before weights are read."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import psutil

from varm_merge.commands.flags import by_name_flag, merge_flags
from varm_merge.commands.style import talks
from varm_merge.tables import size

__all__ = ["check"]


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--offline", is_flag=True, help="Look at the recipe alone, not at its models.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the merge will be written: is there room, how fast is it?",
)
@talks
@by_name_flag
@merge_flags
def check(
    recipe: Path, as_json: bool, offline: bool, out: Path | None, by_name: bool, options: Any, quiet: bool
) -> None:
    """Find all that is wrong with a recipe of any merge method, before weights are read or downloaded.

    mergekit plans the merge from configs and headers of weight files (of a model on the Hub by HTTP ranges), and
    transformers tells whether the result would load. What the merge would take is estimated: memory by a formula,
    time by a second of measurements on this machine. Of targets in 16 bits a sample of the weights is read, to see
    how much of the fine-tune rounding has left. Exit code 0 if it can be merged (with --out: written there), 1 if
    not.

    \b
    Examples:
      varm-merge check recipe.yaml
      varm-merge check recipe.yaml --out /data/out
      varm-merge check recipe.yaml --offline
      varm-merge check recipe.yaml --json
    """
    from varm_merge import rounding
    from varm_merge.errors import VarmError
    from varm_merge.recipe import Looked, Problem, read
    from varm_merge.recipe import check as problems_of

    start_s = time.time() - psutil.Process().create_time()
    looked = Looked()
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
    except VarmError as error:
        problems = [Problem(error.message, 1)]
    found: dict[str, Any] = {} if offline else looked.estimate
    if not problems and not offline:
        looked.remarks += rounding.remarks(text, looked)
    remarks = sorted(looked.remarks, key=lambda one: one.line)
    if found and not problems:
        import yaml

        from varm_merge import estimate

        found = estimate.estimate(yaml.safe_load(text), looked, start_s, out, options.transformers_cache)
        remarks += [Problem(one, 1) for one in estimate.shortages(found)]
    if out is not None:
        from varm_merge import estimate

        problems += [Problem(one, 1) for one in estimate.obstacles(found, out)]
    if as_json:
        told = {
            name: [asdict(one) for one in some] for name, some in (("problems", problems), ("remarks", remarks))
        }
        click.echo(json.dumps({"recipe": str(recipe), **told, "estimate": found}, indent=1))
    else:
        for mark, colour, some in (("✗", "red", problems), ("!", "yellow", remarks)):
            for one in some:
                click.secho(f"{mark} line {one.line}: {one.message}", fg=colour)
        if not problems:
            verdict = "is sound; its models were not looked at" if offline else "can be merged"
            click.secho(f"✓ {recipe} {verdict}", fg="green")
        for line in _told(found):
            click.echo(line)
    sys.exit(1 if problems else 0)


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
    if seconds := found.get("seconds"):
        parts = ", ".join(f"{name} {_rounded(seconds[name])}" for name in ("start", "read", "merge", "write"))
        lines.append(f"takes about {_rounded(seconds['total'])} on this CPU ({parts})")
    elif "seconds" in found:
        lines.append(f"how long it takes could not be measured: {found['not_measured']}")
    return lines


def _rounded(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
