"""The ``fusion-trainer`` program."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel

from fusion_trainer.config import (
    AlignConfig,
    EvaluateConfig,
    ExtractConfig,
    PrepareConfig,
    TrainConfig,
    read_config,
)
from fusion_trainer.pipeline.processes import end_with_the_run
from fusion_trainer.pipeline.stage import KINDS
from varm_common.console import completion, talks
from varm_common.errors import UserError, listed

__all__ = ["main"]

Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="varm-merge", prog_name="fusion-trainer")
def main() -> None:
    """Fuse chat LLMs pairwise: from source models and chat data to the target checkpoints that VaRM merges.

    `run` does all of it by one file; the other commands are its stages, and looks at what they make.

    Exit codes: 0 done, and nothing is wrong; 1 something is wrong, and said, or stopped by Ctrl-C; 2 the command
    line is wrong.
    """
    end_with_the_run()


main.add_command(completion("fusion-trainer"))


def _settings_as_flags(kind: type[BaseModel]) -> Callable[[Command], Command]:
    """One option for each setting of ``kind``; a flag that is not given is left to the config file."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(kind.model_fields.items()):
            shown = field.description or ""
            if not field.is_required() and field.default is not None:
                shown += f"  [default: {field.default}]"
            flag = "--" + name.replace("_", "-")
            options: dict[str, Any] = {"default": None, "help": shown}
            of = [part for part in _members(field.annotation) if part is not type(None)]
            if of == [bool]:
                flag += f"/--no-{name.replace('_', '-')}"
            elif get_origin(of[0]) is dict:
                options |= {"multiple": True, "type": str, "metavar": "NAME=VALUE", "callback": _mapping}
            elif any(get_origin(part) is list for part in of):
                options |= {"multiple": True, "type": str}
            else:
                choices = [choice for part in of if get_origin(part) is Literal for choice in get_args(part)]
                options["type"] = click.Choice(choices) if choices else of[0]
                if of[0] is Path:
                    options["type"] = click.Path(path_type=Path)
            command = click.option(flag, name, **options)(command)
        return click.argument("config", required=False, type=click.Path(path_type=Path))(command)

    return decorate


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _mapping(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, Any] | None:
    """``NAME=VALUE``, the value as YAML reads it."""
    wrong = [one for one in given if "=" not in one]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given)} or None


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flags.items()
        if value not in (None, ())
    }


@main.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the stages, how each stands, and estimates.")
@click.option("--until", type=click.Choice(KINDS), help="The last kind of stage to run.")
@click.option("--only", metavar="TARGET", help="This target, and what it needs.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the stages as JSON.")
@talks()
def run(pipeline: Path, dry_run: bool, until: str | None, only: str | None, as_json: bool) -> None:
    """Run every stage of the file PIPELINE that is not made yet, from chat data to the merged and scored models.

    Stopped at any point, the same command goes on. A changed setting runs again what depends on it, and says why.

    \b
    Example:
      fusion-trainer run pipeline.yaml --dry-run
    """
    from fusion_trainer.pipeline.plan import chosen, read_pipeline
    from fusion_trainer.pipeline.stage import Plan
    from fusion_trainer.pipeline.summary import overview, report, standings

    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run")
    config, stages = read_pipeline(pipeline)
    wanted = chosen(stages, until, only)
    plan = Plan(config.work, stages)
    if as_json:
        click.echo(json.dumps(standings(plan, wanted), indent=1))
        return
    if dry_run:
        click.echo(overview(plan, wanted, config))
        return
    made = plan.run(wanted)
    click.echo(
        f"{len(made)} of {len(wanted)} stages were run" if made else f"all {len(wanted)} stages are up to date"
    )
    if scores := report(plan):
        click.echo(scores)


@main.command()
@_settings_as_flags(PrepareConfig)
@talks()
def prepare(config: Path | None, **flags: Any) -> None:
    """Render and split the chat data; `extract` does it too, when it has not been done.

    \b
    Example:
      fusion-trainer prepare --data chats.jsonl --pivot openchat/openchat_3.5 --dialogues dialogues/
    """
    from fusion_trainer.data.prepare import prepare as run

    settings = read_config(PrepareConfig, config, _given(flags))
    dialogues = run(settings, Path())
    click.echo(f"{len(dialogues)} blocks in {dialogues.folder}")


@main.command()
@_settings_as_flags(ExtractConfig)
@talks()
def extract(config: Path | None, **flags: Any) -> None:
    """Keep a model's top-k distributions at every token of the assistant.

    Settings come from the YAML file CONFIG, from flags, or both; a flag wins. Stopped at any point, the same
    command goes on where it was. With several GPUs: `accelerate launch -m fusion_trainer extract …`.

    \b
    Example:
      fusion-trainer extract --data chats.jsonl --pivot openchat/openchat_3.5 \\
        --model NousResearch/Nous-Hermes-2-SOLAR-10.7B --output stores/solar
    """
    from accelerate import PartialState

    from fusion_trainer.data.readers import template_notes
    from fusion_trainer.representations.extract import extract as run

    start = time.monotonic()
    store = run(read_config(ExtractConfig, config, _given(flags)))
    if PartialState().is_main_process:
        positions = store.manifest["positions"]
        click.echo(
            f"{store.folder}: {len(store):,} rows, {positions:,} supervised tokens, "
            f"{store.bytes / max(1, positions):.1f} bytes each, {time.monotonic() - start:.0f} s"
        )
        if cut := store.manifest["cut_tokens"]:
            click.echo(f"{cut:,} tokens lie beyond the model's context and have no distribution")
        for line in template_notes(store.manifest):
            click.echo(line)


@main.command()
@_settings_as_flags(AlignConfig)
@talks()
def align(config: Path | None, **flags: Any) -> None:
    """Bring a source's store into the pivot's positions and vocabulary.

    Settings come from the YAML file CONFIG, from flags, or both; a flag wins. Stopped at any point, the same
    command goes on where it was.

    \b
    Example:
      fusion-trainer align --source-store stores/solar --pivot-store stores/pivot --output aligned/solar
    """
    from fusion_trainer.alignment.align import align as run

    aligned, report = run(read_config(AlignConfig, config, _given(flags)))
    click.echo(report)
    click.echo(f"{aligned.folder}: {len(aligned):,} rows")


@main.command()
@_settings_as_flags(TrainConfig)
@talks()
def train(config: Path | None, **flags: Any) -> None:
    """Fine-tune the pivot on the fused distributions: a target.

    Settings come from the YAML file CONFIG, from flags, or both; a flag wins. Stopped at any point, the same
    command goes on from the last whole checkpoint. With several GPUs: `accelerate launch --config_file … -m
    fusion_trainer train …`.

    \b
    Example:
      fusion-trainer train target.yaml --training learning_rate=1e-5
    """
    from accelerate import PartialState

    from fusion_trainer.training.rounding import rounding_told
    from fusion_trainer.training.train import train as run

    target = run(read_config(TrainConfig, config, _given(flags)))
    if PartialState().is_main_process:
        click.echo(f"the target is in {target}")
        if told := rounding_told(target):
            click.echo(told)


@main.command()
@_settings_as_flags(EvaluateConfig)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON, as they stand in --output.")
@talks()
def evaluate(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Score models on held-out dialogues: nats per byte and exact matches, by group of conversations.

    Several models take several --model and as many --output, in the same order.

    \b
    Example:
      fusion-trainer prepare --data held_out.jsonl --pivot openchat/openchat_3.5 --dialogues held_out/
      fusion-trainer evaluate --model targets/solar --dialogues held_out/ --output scores/solar.json
    """
    from accelerate import PartialState

    from fusion_trainer.training.evaluate import evaluate_each

    results = evaluate_each(read_config(EvaluateConfig, config, _given(flags)))
    if not PartialState().is_main_process:
        return
    if as_json:
        click.echo(json.dumps(results if len(results) > 1 else results[0], indent=1))
        return
    for result in results:
        if len(results) > 1:
            click.echo(f"{result['model']}:")
        for name, of in result["groups"].items():
            error = f" ± {of['nats_per_byte_error']:.4f}" if of["nats_per_byte_error"] is not None else ""
            scores = f"{of['nats_per_byte']:.4f}{error} nats/byte  {of['exact_match']:.1%} matched"
            click.echo(f"{name:24} {of['rows']:>7,} rows  {scores}")


@main.command("recipe")
@click.argument("targets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default the terminal.")
@click.option("--pivot", help="Folder or Hub id of the pivot, if it has moved since.")
@click.option(
    "--granularity",
    type=click.Choice(["model", "layer", "module", "matrix", "parameter"]),
    default="matrix",
    show_default=True,
    help="Which tensors share one weight per target.",
)
@click.option("--dtype", help="Of the merged model; default the targets'.")
def write_recipe(
    targets: tuple[Path, ...], out: Path | None, pivot: str | None, granularity: str, dtype: str | None
) -> None:
    """Write the recipe by which stock mergekit-yaml merges TARGETS by VaRM.

    \b
    Example:
      fusion-trainer recipe targets/mixtral targets/solar --out recipe.yaml && mergekit-yaml recipe.yaml out/
    """
    from fusion_trainer.pipeline.merge_recipe import recipe
    from varm_common.files import whole_file, written_to

    text = recipe(targets, pivot=pivot, granularity=granularity, dtype=dtype)
    if out is None:
        click.echo(text, nl=False)
        return
    with written_to(out.parent), whole_file(out) as file:
        file.write(text.encode())
    click.echo(f"{out}: {len(targets)} targets; merge them with `mergekit-yaml {out} OUTPUT/`")


@main.group("vocab-map")
def vocab_map() -> None:
    """Look at vocabulary maps."""


@vocab_map.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--source", help="Folder or Hub id of the source, for its tokenizer, if it has moved since.")
@click.option("--source-revision", help="Branch, tag or commit of --source.")
@click.option("--pivot", help="Folder or Hub id of the pivot, if it has moved since.")
@click.option("--pivot-revision", help="Branch, tag or commit of --pivot.")
@click.option("--store", "weighed", type=click.Path(path_type=Path), help="The source's store, to weigh ids by.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the models' repositories bring along.")
def show_map(file: Path, weighed: Path | None, trust_remote_code: bool, **moved_to: str | None) -> None:
    """Print how much of a vocabulary, and of a store's probability, the map FILE covers, and what it does not.

    \b
    Example:
      fusion-trainer vocab-map show aligned/vocab-map-….safetensors --store stores/solar
    """
    from fusion_trainer.alignment.coverage import coverage, mass_by_id
    from fusion_trainer.alignment.saved_map import load_map
    from fusion_trainer.representations.store import RepresentationStore
    from fusion_trainer.representations.store_tokenizer import tokenizer_at
    from varm_common.errors import unlike

    saved = load_map(file)
    readers = {}
    for side, (name, revision) in saved.places.items():
        other = moved_to[f"{side}_revision"] or (None if moved_to[side] else revision)
        readers[side] = tokenizer_at(moved_to[side] or name, other, trust_remote_code)
    wanted = {side: reader.sha256 for side, reader in readers.items()}
    found = {side: saved.identity[side] for side in wanted}
    if difference := unlike(f"`{file}` is a map of other tokenizers:", wanted, found):
        raise UserError(difference)
    mass = mass_by_id(RepresentationStore(weighed).demand(tokenizer=found["source"])) if weighed else None
    click.echo(coverage(saved.map, readers["source"], readers["pivot"], mass))


@main.group()
def store() -> None:
    """Look at stores, and check them."""


@store.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check the store FOLDER: checksums, NaN, ranges; and its dialogues, token files and maps beside it.

    The exit code is 1 if something is wrong.

    \b
    Example:
      fusion-trainer store verify stores/solar
    """
    from fusion_trainer.representations.store import RepresentationStore
    from fusion_trainer.representations.verify import all_problems

    opened = RepresentationStore(folder)
    problems = list(all_problems(opened))
    if problems:
        raise UserError(f"the store `{folder}` has {len(problems)} problems:{listed(problems)}")
    click.echo(f"{folder}: {len(opened.manifest['shards'])} shards, {len(opened):,} rows, nothing wrong")


@store.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--row", default=0, show_default=True, help="Which row to print.")
@click.option("--positions", default=20, show_default=True, help="Most positions printed of it.")
@click.option("--dialogues", type=click.Path(path_type=Path), help="The folder it was made from, for the text.")
@click.option("--tokenizer", help="Folder or Hub id, if the model has moved since.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model's repository brings along.")
def show(
    folder: Path, row: int, positions: int, dialogues: Path | None, tokenizer: str | None, trust_remote_code: bool
) -> None:
    """Print the manifest of the store FOLDER, and one row, decoded.

    \b
    Example:
      fusion-trainer store show stores/solar --row 17
    """
    from fusion_trainer.representations.show_store import show_manifest, show_row
    from fusion_trainer.representations.store import RepresentationStore

    opened = RepresentationStore(folder)
    if not 0 <= row < len(opened):
        raise UserError(f"the store has the rows 0 to {len(opened) - 1}, not {row}")
    click.echo(show_manifest(opened))
    click.echo(show_row(opened, row, positions, dialogues, tokenizer, trust_remote_code))


if __name__ == "__main__":
    sys.exit(main())
