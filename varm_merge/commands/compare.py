"""``varm-merge compare``: several merges of the same models side by side."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from varm_common.console import talks
from varm_common.tables import show
from varm_merge.commands.flags import COUNT, PLACE, READ, flag, option, with_cache_dir, with_device, with_trust
from varm_merge.commands.task_flags import task_flags, with_commas

__all__ = ["compare"]


@click.command()
@click.argument("recipes", nargs=-1, type=READ)
@option("--out", required=True, type=PLACE, help="Folder of the report. `--tasks list` needs none.")
@with_commas(
    "--methods",
    help="Merge methods, comma-separated; varm:GRANULARITY is VaRM at that granularity, della:density=0.6 sets a "
    "parameter.",
)
@option("--base", help="The pivot, for --methods or if the recipes do not name it.")
@with_commas("--models", help="Targets for --methods, comma-separated or repeated.")
@option("--held-out", multiple=True, help="Chats or text to score on: JSONL, Parquet or a Hub id.")
@option("--template", help="Chat template for --held-out. Default: the pivot's.")
@task_flags
@option("--repeat", type=COUNT, default=1, help="How often each recipe is merged; times are medians.")
@option("--keep/--no-keep", default=True, help="Keep the merged models, in OUT/models.")
@with_device
@option("--seed", default=0, help="Random seed, for methods that drop elements at random.")
@click.option("--mergekit", default="", help="Options for mergekit-yaml, for example --mergekit=--lazy-unpickle.")
@with_cache_dir
@with_trust
@flag("--json", "as_json", help="Print the content of report.json.")
@talks(libraries=False)
def compare(
    recipes: tuple[Path, ...], out: Path, methods: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Merge the same models by several RECIPES or --methods, and compare the merged models in one report.

    A separate mergekit-yaml process runs each merge. report.md, report.json and report.html show time, peak
    anonymous memory, and distances to the pivot and the targets; with --held-out or --tasks also scores. If
    interrupted, run the same command again: finished steps are kept. --no-keep removes each merged model after it
    was measured. With one recipe and no --models, --methods merges the recipe's models. Methods from --methods use
    their published settings. Exit code 1 if a recipe could not be merged or measured; it is reported, and the rest
    still run. If the held-out data or a task cannot be used, the comparison stops before the first merge.

    \b
    Examples:
      varm-merge compare varm.yaml ties.yaml --out report/
      varm-merge compare --methods varm,varm:layer,ties,sce --base pivot/ --models t1/,t2/ --out report/
      varm-merge compare recipe.yaml --methods karcher,della:density=0.6:epsilon=0.1 --out report/
      varm-merge compare recipe.yaml --methods linear --held-out chats.jsonl --no-keep --out report/
      varm-merge compare *.yaml --out report/ --tasks hellaswag,mine --include-path tasks/ --limit 200
      varm-merge compare *.yaml --out report/ --tasks fusellm,mmlu:5 --backend vllm
      varm-merge compare *.yaml --out report/ --repeat 5 --device cuda --json > numbers.json
    """
    from varm_common.errors import UserError
    from varm_merge.comparison.cache import demand_folder, exclusive
    from varm_merge.comparison.recipes import entries, family, sound
    from varm_merge.comparison.report import problems, terminal, write_report
    from varm_merge.comparison.runner import compare as run
    from varm_merge.comparison.scores import HeldOut
    from varm_merge.comparison.settings import Settings

    base, models = options.pop("base"), options.pop("models")
    data, template = options.pop("held_out"), options.pop("template")
    if template and not data:
        raise click.UsageError("--template needs --held-out")
    if models and not methods:
        raise click.UsageError("--models needs --methods")
    if options["tasks"] and options["tasks"].served and not options["keep"]:
        raise click.UsageError("--no-keep removes the models that the servers are to serve; leave it out")
    options["mergekit"] = tuple(shlex.split(options["mergekit"]))
    settings = Settings(out, quiet=quiet, held_out=HeldOut(data, template) if data else None, **options)
    demand_folder(out)
    with exclusive(out):
        all_entries = entries(recipes, methods, base, models, out / "recipes")
        merged = family(sound(all_entries, settings.cache_dir), base)
        try:
            report = run(all_entries, merged, settings, shlex.join(["varm-merge", *sys.argv[1:]]))
        except OSError as error:  # a file that was there when the comparison started
            raise UserError(f"`{error.filename}`: {error.strerror or error}") from error
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_report(report, out, text)
    if as_json:
        click.echo(text, nl=False)
    else:
        for table in terminal(report):
            show(*table)
        click.echo(f"\n{out / 'report.html'}, .md, .json")
    wrong = problems(report)
    for problem in wrong:
        click.secho(f"✗ {problem}", fg="red", err=True)
    sys.exit(1 if wrong else 0)
