"""``varm-merge tune``: the values of a recipe's parameters that do best on held-out text."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from varm_common.console import talks
from varm_common.tables import show
from varm_merge.commands.flags import PLACE, READ, flag, merge_flags, option, with_device

__all__ = ["tune"]

SHARE = click.FloatRange(min=0.05, max=0.95)


@click.command()
@click.argument("recipe", type=READ)
@option("--held-out", multiple=True, required=True, help="Chats or text: JSONL, Parquet or a Hub id.")
@option("--out", required=True, type=PLACE, help="Folder of the result.")
@option("--base", help="The pivot, if the recipe names none. Default: its base_model.")
@option("--template", help="Chat template for --held-out. Default: the pivot's.")
@option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME[:target|:depth][=LOW:HIGH]",
    help="What to search: one number, one per target, or three over the depth. Default: lambda.",
)
@option("--evaluations", type=click.IntRange(min=3), help="Maximum number of merges. Default: 12 for each number.")
@option("--report-share", type=SHARE, default=0.5, help="Share of the conversations that only report the result.")
@option(
    "--seed", default=0, help="Random seed, for splitting the conversations and for methods that drop elements."
)
@with_device
@flag("--json", "as_json", help="Print the content of tuned.json.")
@talks(libraries=False)
@merge_flags
def tune(recipe: Path, out: Path, as_json: bool, options: Any, quiet: bool, **settings: Any) -> None:
    """Find the values of a recipe's parameters with the lowest loss on held-out text, and write the recipe.

    It works for every merge method that has a numeric parameter. By default it searches lambda, the scale of the
    merged task vector; for methods without lambda it searches t, select_topk, or a weight for each target. Some of
    the conversations choose the values, and the others report the result. Merged weights stay in memory. If
    interrupted, run the same command again: scores are kept. --parameter can be repeated.

    \b
    Examples:
      varm-merge tune recipe.yaml --held-out chats.jsonl --out tuned/
      varm-merge tune recipe.yaml --held-out chats.jsonl --out tuned/ --parameter lambda=0:4
      varm-merge tune recipe.yaml --held-out chats.jsonl --out tuned/ --parameter lambda --parameter weight:target
      varm-merge tune ties.yaml --held-out chats.jsonl --out tuned/ --parameter density --evaluations 8
      mergekit-yaml tuned/recipe.yaml merged/
    """
    from varm_merge.comparison.cache import demand_folder, exclusive
    from varm_merge.comparison.scores import HeldOut
    from varm_merge.tuning.report import tables, verdict
    from varm_merge.tuning.tune import Tuning
    from varm_merge.tuning.tune import tune as run

    held_out = HeldOut(settings.pop("held_out"), settings.pop("template"))
    tuning = Tuning(recipe, out, held_out, quiet=quiet, **settings)
    demand_folder(out, "tune")
    with exclusive(out, "tune"):
        report = run(tuning, options, shlex.join(["varm-merge", *sys.argv[1:]]))
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for table in tables(report):
        show(*table)
    for remark in report["remarks"]:
        click.secho(f"! {remark}", fg="yellow", err=True)
    click.echo(f"\n{verdict(report)}\n{out / 'recipe.yaml'}, tuned.json")
