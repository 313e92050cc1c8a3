"""The ``fusion-trainer`` program."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from fusion_trainer.commands.files import store, vocab_map
from fusion_trainer.pipeline.stage import KINDS
from varm_common.console import Program, completion, talks

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["main"]

GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")
"""Granularities of VaRM, from one weight per target to one per element."""
PATH = click.Path(path_type=Path)


class StageCommand(click.Command):
    """A command with an argument ``[CONFIG]`` and one option for each setting of a stage.

    The options are built when they are needed, because pydantic is slow to import.

    Args:
        settings: Name of the settings' model in ``fusion_trainer.config``.
    """

    def __init__(self, *arguments: Any, settings: str, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.settings = settings

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        if self.settings:
            from fusion_trainer import config

            fields: dict[str, FieldInfo] = getattr(config, self.settings).model_fields
            self.params[:0] = [click.Argument(["config"], required=False, type=PATH), *_options(fields)]
            self.settings = ""
        return super().get_params(context)


def _options(fields: "dict[str, FieldInfo]") -> Iterator[click.Option]:
    for name, field in fields.items():
        shown = field.description or ""
        if not field.is_required() and field.default not in (None, []):
            shown += f"  [default: {field.default}]"
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"help": shown}
        annotation = field.annotation
        if get_origin(annotation) in (Union, UnionType):  # a type or None, or one value or a list
            parts = [part for part in get_args(annotation) if part is not type(None)]
            annotation = next((part for part in parts if get_origin(part) is list), parts[0])
        if annotation is bool:
            flag += f"/--no-{name.replace('_', '-')}"
        elif get_origin(annotation) is dict:
            options |= {"multiple": True, "metavar": "NAME=VALUE", "callback": _mapping}
        elif get_origin(annotation) is list:
            options |= {"multiple": True}
        elif get_origin(annotation) is Literal:
            options["type"] = click.Choice(get_args(annotation))
        else:
            options["type"] = PATH if annotation is Path else annotation
        yield click.Option([flag, name], default=None, **options)


def _mapping(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, Any] | None:
    """Values of ``NAME=VALUE`` by name, read as YAML."""
    import yaml

    if wrong := [argument for argument in given if "=" not in argument]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    pairs = [argument.split("=", 1) for argument in given]
    return {name: yaml.safe_load(value) for name, value in pairs} or None


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="varm-merge", prog_name="fusion-trainer")
def main() -> None:
    """Fuse chat LLMs: train targets from a pivot, sources and chat data. VaRM can then merge the targets.

    `run` executes a whole pipeline from one file. The other commands run single stages or inspect their results.

    Exit codes: 0: success. 1: a problem was found and printed, or Ctrl-C was pressed. 2: bad usage.
    """
    from fusion_trainer.pipeline.processes import end_with_the_run

    end_with_the_run()


main.add_command(completion("fusion-trainer"))


@main.command()
@click.argument("pipeline", type=PATH)
@click.option(
    "--dry-run", is_flag=True, help="Print every stage, whether it has to run, and an estimate. Run nothing."
)
@click.option("--until", type=click.Choice(list(KINDS)), help="Stop after the stages of this kind.")
@click.option("--only", metavar="TARGET", help="Run only this target and the stages it needs.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the stages as JSON.")
@talks()
def run(pipeline: Path, dry_run: bool, until: str | None, only: str | None, as_json: bool) -> None:
    """Run the pipeline in the YAML file PIPELINE, from chat data to merged models and their scores.

    Finished stages are not run again. If interrupted, run the same command again. If a setting changes, the stages
    that depend on it run again, and the reason is printed.

    \b
    Example:
      fusion-trainer run pipeline.yaml --dry-run
    """
    from fusion_trainer.pipeline.plan import chosen, read_pipeline
    from fusion_trainer.pipeline.runner import Runner
    from fusion_trainer.pipeline.summary import as_records, overview, report

    if as_json and not dry_run:
        raise click.UsageError("--json needs --dry-run")
    config, stages = read_pipeline(pipeline)
    wanted = chosen(stages, until, only)
    runner = Runner(config.work, stages)
    if dry_run:
        states = runner.states(wanted)
        click.echo(json.dumps(as_records(states), indent=1) if as_json else overview(states, config))
        return
    made, number = runner.run(wanted), len(wanted)
    click.echo(f"{len(made)} of {number} stages were run" if made else f"all {number} stages are up to date")
    if scores := report(runner):
        click.echo(scores)


@main.command(cls=StageCommand, settings="PrepareConfig")
@talks()
def prepare(config: Path | None, **flags: Any) -> None:
    """Render the chat data with a chat template and split it into blocks.

    `extract` does the same if the folder of dialogues does not exist yet. Settings come from the YAML file CONFIG,
    from options, or both; options take precedence.

    \b
    Example:
      fusion-trainer prepare --data chats.jsonl --pivot openchat/openchat_3.5 --dialogues dialogues/
    """
    from fusion_trainer.config import PrepareConfig, read_config
    from fusion_trainer.data.prepare import prepare as run_stage

    dialogues = run_stage(read_config(PrepareConfig, config, flags), Path())
    click.echo(f"{len(dialogues)} blocks in {dialogues.folder}")


@main.command(cls=StageCommand, settings="ExtractConfig")
@talks()
def extract(config: Path | None, **flags: Any) -> None:
    """Store a model's top-k next-token distributions at every assistant token.

    Settings come from the YAML file CONFIG, from options, or both; options take precedence. If interrupted, run
    the same command again. With several GPUs: `accelerate launch -m fusion_trainer extract …`.

    \b
    Example:
      fusion-trainer extract --data chats.jsonl --pivot openchat/openchat_3.5 \\
        --model NousResearch/Nous-Hermes-2-SOLAR-10.7B --output stores/solar
    """
    from accelerate import PartialState

    from fusion_trainer.config import ExtractConfig, read_config
    from fusion_trainer.data.readers import template_notes
    from fusion_trainer.representations.extract import extract as run_stage

    start = time.monotonic()
    store = run_stage(read_config(ExtractConfig, config, flags))
    if PartialState().is_main_process:
        positions = store.manifest["positions"]
        click.echo(
            f"{store.folder}: {len(store):,} rows, {positions:,} supervised tokens, "
            f"{store.bytes / max(1, positions):.1f} bytes each, {time.monotonic() - start:.0f} s"
        )
        if cut := store.manifest["cut_tokens"]:
            click.echo(f"{cut:,} tokens are beyond the model's context length and have no distribution")
        for line in template_notes(store.manifest):
            click.echo(line)


@main.command("import", cls=StageCommand, settings="ImportConfig")
@talks()
def import_published(config: Path | None, **flags: Any) -> None:
    """Turn representations that the authors of FuseLLM and FuseChat published into stores.

    Settings come from the YAML file CONFIG, from options, or both; options take precedence. If interrupted, run
    the same command again.

    \b
    Example:
      fusion-trainer import --data aligned-representations/ --pivot openchat/openchat_3.5 \\
        --model NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO --pivot-store stores/pivot --output aligned/mixtral
    """
    from fusion_trainer.config import ImportConfig, read_config
    from fusion_trainer.published.import_rows import import_rows

    store, report = import_rows(read_config(ImportConfig, config, flags))
    click.echo(report)
    click.echo(f"{store.folder}: {len(store):,} rows")


@main.command(cls=StageCommand, settings="AlignConfig")
@talks()
def align(config: Path | None, **flags: Any) -> None:
    """Map a source's store to the pivot's positions and vocabulary.

    Settings come from the YAML file CONFIG, from options, or both; options take precedence. If interrupted, run
    the same command again.

    \b
    Example:
      fusion-trainer align --source-store stores/solar --pivot-store stores/pivot --output aligned/solar
    """
    from fusion_trainer.alignment.align import align as run_stage
    from fusion_trainer.config import AlignConfig, read_config

    aligned, report = run_stage(read_config(AlignConfig, config, flags))
    click.echo(report)
    click.echo(f"{aligned.folder}: {len(aligned):,} rows")


@main.command(cls=StageCommand, settings="TrainConfig")
@talks()
def train(config: Path | None, **flags: Any) -> None:
    """Fine-tune the pivot on the fused distributions; the result is a target.

    Settings come from the YAML file CONFIG, from options, or both; options take precedence. If interrupted, run
    the same command again: it resumes from the last complete checkpoint. With several GPUs: `accelerate launch
    --config_file … -m fusion_trainer train …`.

    \b
    Example:
      fusion-trainer train target.yaml --training learning_rate=1e-5
    """
    from accelerate import PartialState

    from fusion_trainer.config import TrainConfig, read_config
    from fusion_trainer.training.rounding import rounding_sentence
    from fusion_trainer.training.train import train as run_stage

    target = run_stage(read_config(TrainConfig, config, flags))
    if PartialState().is_main_process:
        click.echo(f"the target is in {target}")
        if rounding := rounding_sentence(target):
            click.echo(rounding)


@main.command(hidden=True)
@click.option("--dialogues", required=True, type=PATH, help="Folder of prepared held-out dialogues.")
@click.option("--batch-tokens", default=16384, show_default=True, help="Maximum size of a batch, in tokens.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model repositories.")
@talks()
def serve_scores(dialogues: Path, batch_tokens: int, trust_remote_code: bool) -> None:
    """Score the models that arrive on standard input, tensor by tensor; `varm-merge tune` starts this program.

    \b
    Example:
      fusion-trainer serve-scores --dialogues held_out/
    """
    from fusion_trainer.training.serve_scores import serve

    serve(dialogues, batch_tokens, trust_remote_code)


@main.command(cls=StageCommand, settings="EvaluateConfig")
@click.option("--json", "as_json", is_flag=True, help="Print the content of the scores file.")
@talks()
def evaluate(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Score models on held-out dialogues, by group of conversations: loss in nats per byte, and exact matches.

    To score several models, give --model several times, and one --output for each, in the same order.

    Settings come from the YAML file CONFIG, from options, or both; options take precedence.

    \b
    Example:
      fusion-trainer prepare --data held_out.jsonl --pivot openchat/openchat_3.5 --dialogues held_out/
      fusion-trainer evaluate --model targets/solar --dialogues held_out/ --output scores/solar.json
    """
    from accelerate import PartialState

    from fusion_trainer.config import EvaluateConfig, read_config
    from fusion_trainer.training.evaluate import evaluate_each

    results = evaluate_each(read_config(EvaluateConfig, config, flags))
    if not PartialState().is_main_process:
        return
    if as_json:
        click.echo(json.dumps(results if len(results) > 1 else results[0], indent=1))
        return
    for result in results:
        if len(results) > 1:
            click.echo(f"{result['model']}:")
        for name, scores in result["groups"].items():
            error = scores["nats_per_byte_error"]
            spread = f" ± {error:.4f}" if error is not None else ""
            loss = f"{scores['nats_per_byte']:.4f}{spread} nats/byte"
            click.echo(f"{name:24} {scores['rows']:>7,} rows  {loss}  {scores['exact_match']:.1%} matched")


@main.command("recipe")
@click.argument("targets", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="File to write. Default: print the recipe.")
@click.option("--pivot", help="Folder or Hub id of the pivot, if it has moved.")
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    default="matrix",
    show_default=True,
    help="Which tensors share one merge weight per target.",
)
@click.option("--dtype", help="Dtype of the merged model. Default: the targets'.")
def write_recipe(
    targets: tuple[Path, ...], out: Path | None, pivot: str | None, granularity: str, dtype: str | None
) -> None:
    """Write a mergekit recipe that merges TARGETS with VaRM.

    \b
    Example:
      fusion-trainer recipe targets/mixtral targets/solar --out recipe.yaml && mergekit-yaml recipe.yaml out/
    """
    from fusion_trainer.pipeline.merge_recipe import recipe
    from varm_common.files import write_file

    text = recipe(targets, pivot=pivot, granularity=granularity, dtype=dtype)
    if out is None:
        click.echo(text, nl=False)
        return
    write_file(out, text)
    click.echo(f"{out}: {len(targets)} targets; merge them with `mergekit-yaml {out} OUTPUT/`")


@main.command()
@click.argument("model")
@click.argument("out", type=PATH)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@talks()
def convert(model: str, out: Path, revision: str | None) -> None:
    """Rewrite the pickled weights (.bin) of MODEL as safetensors in the folder OUT.

    MODEL is a folder or a Hub id. Pickles are read without running their code. If interrupted, run the same
    command again.

    \b
    Example:
      fusion-trainer convert openchat/openchat_3.5 models/openchat
    """
    from varm_common.conversion import convert as run_stage

    written = run_stage(model, out, revision)
    click.echo(f"{out}: {'written' if written else 'this conversion is there already'}")


main.add_command(vocab_map)
main.add_command(store)


if __name__ == "__main__":
    sys.exit(main())
