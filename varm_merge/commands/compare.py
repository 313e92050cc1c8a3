"""``varm-merge compare``: several merges of the same models side by side."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from varm_common.console import talks
from varm_common.tables import show
from varm_merge.commands.task_flags import comma_separated, task_flags

__all__ = ["compare"]


@click.command()
@click.argument("recipes", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the report. `--tasks list` needs none.",
)
@click.option(
    "--methods",
    multiple=True,
    callback=comma_separated,
    help="Merge methods, comma-separated; varm:GRANULARITY is VaRM at that granularity, della:density=0.6 sets a "
    "parameter.",
)
@click.option("--base", help="The pivot, for --methods or if the recipes do not name it.")
@click.option(
    "--models", multiple=True, callback=comma_separated, help="Targets for --methods, comma-separated or repeated."
)
@click.option("--held-out", multiple=True, help="Chats or text to score on: JSONL, Parquet or a Hub id.")
@click.option("--template", help="Chat template for --held-out. Default: the pivot's.")
@task_flags
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often each recipe is merged; times are medians.",
)
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the merged models, in OUT/models.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Default: cpu for merges, a GPU for scores if there is one.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed, for methods that drop elements at random."
)
@click.option("--mergekit", default="", help="Options for mergekit-yaml, for example --mergekit=--lazy-unpickle.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Where models from the Hub are stored.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the models.")
@click.option("--json", "as_json", is_flag=True, help="Print the content of report.json.")
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
