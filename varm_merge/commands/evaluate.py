"""``varm-merge evaluate``: answers to MT-Bench and AlpacaEval 2, judged, as tables."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from varm_merge.commands.style import talks
from varm_merge.tables import show

if TYPE_CHECKING:
    from varm_merge.evaluation.endpoint import Endpoint, Judged, Load

__all__ = ["evaluate"]

READ = click.Path(exists=True, dir_okay=False, path_type=Path)
WRITTEN = click.Path(dir_okay=False, path_type=Path)
Command = Callable[..., None]


@click.group()
def evaluate() -> None:
    """Answer MT-Bench and AlpacaEval 2, have the answers judged, show the results.

    Answers and judgments are in the files of FastChat's llm_judge and of alpaca_eval: each step can be theirs.
    Every step goes on where it was stopped. Exit codes: 0 all is there; 1 something is missing or wrong, and said;
    2 the command line is wrong.

    \b
    Examples:
      varm-merge evaluate answers merged/ --questions question.jsonl --output model_answer/VaRM.jsonl
      varm-merge evaluate judge mt-bench model_answer/VaRM.jsonl --questions question.jsonl \\
        --prompts judge_prompts.jsonl --references reference_answer/gpt-4.jsonl --judge gpt-4-0613 \\
        --output model_judgment/gpt-4-0613_single.jsonl
      varm-merge evaluate results model_judgment/gpt-4-0613_single.jsonl --questions question.jsonl --baseline CLM
    """


@evaluate.group()
def judge() -> None:
    """Have answers judged through an OpenAI-compatible endpoint.

    \b
    Examples:
      varm-merge evaluate judge mt-bench --help
      varm-merge evaluate judge alpaca-eval --help
    """


def through_endpoint(prefix: str) -> Callable[[Command], Command]:
    """The options of how an endpoint is asked."""
    options: list[Callable[[Command], Command]] = [
        click.option(
            f"--{prefix}key-env",
            "key_variable",
            metavar="NAME",
            help="Environment variable with the endpoint's key.  [default: OPENAI_API_KEY for api.openai.com; no "
            "other endpoint is sent a key]",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=120,
            show_default=True,
            help="Seconds for one try.",
        ),
        click.option(
            "--max-retries",
            type=click.IntRange(min=0),
            default=8,
            show_default=True,
            help="Tries after the first, after timeouts, 429, 5xx and broken replies.",
        ),
        click.option(
            "--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Requests at a time."
        ),
        click.option(
            "--requests-per-minute", type=click.FloatRange(min=0, min_open=True), help="At most, tries included."
        ),
        click.option(
            "--tokens-per-minute",
            type=click.FloatRange(min=0, min_open=True),
            help="At most, of estimated prompts and the longest answers there may be.",
        ),
    ]

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def judged(command: Command) -> Command:
    """The options of a command that asks a judge."""
    options: list[Callable[[Command], Command]] = [
        click.option("--judge", "judge_model", required=True, help="The judge's name at the endpoint."),
        click.option(
            "--judge-url",
            "url",
            default="https://api.openai.com/v1",
            show_default=True,
            help="The endpoint, without /chat/completions.",
        ),
        through_endpoint("judge-"),
        click.option("--price-in", type=click.FloatRange(min=0), help="Dollars for a million prompt tokens."),
        click.option("--price-out", type=click.FloatRange(min=0), help="Dollars for a million answered tokens."),
        click.option("--yes", "-y", is_flag=True, help="Do not ask before it starts."),
        click.option("--dry-run", is_flag=True, help="Show what it would cost, and ask nothing."),
        click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON."),
        talks,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@evaluate.command()
@click.argument("model")
@click.option("--questions", required=True, type=READ, help="MT-Bench's question.jsonl or AlpacaEval's JSON.")
@click.option("--output", "-o", required=True, type=WRITTEN, help="The file of answers.")
@click.option("--name", help="What the model is called in the file.  [default: the last part of MODEL]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Most tokens of an answer.",
)
@click.option(
    "--num-choices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answers to each question of MT-Bench; judges read the first.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="For all questions.  [default: FastChat's by category; 0 for AlpacaEval]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Answers at a time; halved when memory does not suffice.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:1, …; auto: all accelerators.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto: as they are stored.",
)
@click.option("--chat-template", type=READ, help="A Jinja file to use in place of the model's template.")
@click.option("--revision", help="Of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along.")
@click.option("--url", help="Ask MODEL at an OpenAI-compatible endpoint (vLLM, …), without /chat/completions.")
@through_endpoint("")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
@talks
def answers(
    model: str,
    questions: Path,
    output: Path,
    name: str | None,
    max_new_tokens: int,
    num_choices: int,
    temperature: float | None,
    seed: int,
    url: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer the questions of MT-Bench or AlpacaEval; which of the two, the file of questions tells.

    MODEL is a folder, a Hub id, or with --url a model's name at the endpoint. Its own chat template is used, and a
    second turn is asked after its own first answer. Samples (FastChat's temperatures, and of the generation config
    top-k, else 50, and top-p) depend on seed, question and turn, not on the batch. A killed run goes on when the
    same command is given again; OUTPUT is there when the last answer is. It sits beside OUTPUT.settings.json, by
    which a run with another model or other settings is refused.

    \b
    Examples:
      varm-merge evaluate answers merged/ --questions question.jsonl --output model_answer/VaRM.jsonl
      varm-merge evaluate answers merged/ --questions alpaca_eval.json --output VaRM/outputs.json --name VaRM
      varm-merge evaluate answers VaRM --url http://localhost:8000/v1 --concurrency 16 \\
        --questions question.jsonl --output model_answer/VaRM.jsonl
    """
    from varm_merge.evaluation.answers import Asking, answer_at_endpoint, answer_locally
    from varm_merge.evaluation.questions import read_questions

    _refuse_unread(LOCAL if url else REMOTE, "it is of no use with --url" if url else "it is for --url alone")
    read = read_questions(questions)
    if num_choices > 1 and read.benchmark == "AlpacaEval":
        raise click.UsageError(
            "--num-choices is for MT-Bench: AlpacaEval's file has one output for an instruction"
        )
    called = name or (Path(model).resolve() if Path(model).is_dir() else Path(model)).name
    asking = Asking(called, max_new_tokens, num_choices, temperature, seed)
    if url is None:
        from varm_merge.evaluation.local import LocalModel

        local = LocalModel(
            model,
            max_new_tokens=max_new_tokens,
            say=lambda text: click.secho(f"! {text}", fg="yellow", err=True),
            **{key: options[key] for key in LOCAL},
        )
        outcome = answer_locally(read, asking, local, output, quiet)
    else:
        endpoint = _endpoint(url, model, **options)
        endpoint.open()
        outcome = answer_at_endpoint(read, asking, endpoint, output, options["concurrency"], quiet)
    if as_json:
        click.echo(json.dumps({"output": str(output), "benchmark": read.benchmark, **vars(outcome)}, indent=1))
    else:
        _tell_failures(outcome.failed)
        before = f", {outcome.there} before" if outcome.there else ""
        click.echo(f"{read.benchmark}: {outcome.answered} of {len(read.questions)} questions answered{before}")
        for end, what in ENDS.items():
            if outcome.ends[end]:
                click.secho(f"! {what}: {outcome.ends[end]}", fg="yellow")
        if not outcome.failed:
            click.secho(f"✓ {output}", fg="green")
    sys.exit(1 if outcome.failed else 0)


LOCAL = ("revision", "device", "dtype", "batch_size", "chat_template", "trust_remote_code")
CLIENT = ("key_variable", "timeout", "max_retries", "requests_per_minute", "tokens_per_minute")
REMOTE = (*CLIENT, "concurrency")
"""Options of a model on this machine, of the client of an endpoint, and of how an endpoint is asked."""


def _refuse_unread(names: tuple[str, ...], why: str) -> None:
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in names:
            raise click.BadOptionUsage(str(option.name), f"{option.opts[0]}: {why}")


ENDS = {
    "length": "answers cut at --max-new-tokens",
    "context": "answers cut where the model's context ends",
    "no room": "empty answers, where the question fills the model's context",
}
"""What is said of answers that did not stop of themselves."""


@judge.command("mt-bench")
@click.argument("answers", nargs=-1, required=True, type=READ)
@click.option("--questions", required=True, type=READ, help="MT-Bench's question.jsonl.")
@click.option("--prompts", required=True, type=READ, help="FastChat's judge_prompts.jsonl.")
@click.option("--references", type=READ, help="Right answers, FastChat's reference_answer/….jsonl.")
@click.option("--output", "-o", required=True, type=WRITTEN, help="The file of judgments; it may have others.")
@judged
def judge_mt_bench(
    answers: tuple[Path, ...],
    questions: Path,
    prompts: Path,
    references: Path | None,
    output: Path,
    **options: Any,
) -> None:
    """Rate each turn of each answer from 1 to 10 (single-answer grading), at temperature 0.

    ANSWERS are files of answers, one for each model, named after it. Questions of math, reasoning and coding are
    judged beside a reference answer. OUTPUT has FastChat's keys, and grows by lines: what it has is not asked
    again. As with FastChat, a judgment without [[rating]] (or [rating]) is kept with the score -1 and in no
    average; it is counted, and asked again when its line is removed.

    \b
    Examples:
      varm-merge evaluate judge mt-bench model_answer/*.jsonl --questions question.jsonl \\
        --prompts judge_prompts.jsonl --references reference_answer/gpt-4.jsonl --judge gpt-4-0613 \\
        --output model_judgment/gpt-4-0613_single.jsonl --price-in 30 --price-out 60 --dry-run
      varm-merge evaluate judge mt-bench model_answer/VaRM.jsonl --questions question.jsonl \\
        --prompts judge_prompts.jsonl --references reference_answer/gpt-4.jsonl --judge prometheus \\
        --judge-url http://localhost:8000/v1 --output model_judgment/prometheus_single.jsonl --yes
    """
    from varm_merge.evaluation import mt_bench
    from varm_merge.evaluation.journal import rows_in
    from varm_merge.evaluation.questions import read_questions

    games = mt_bench.games(read_questions(questions), answers, prompts, references)
    missing = mt_bench.missing(games, options["judge_model"], output, rows_in(output))
    _judge(
        mt_bench.load(missing),
        len(games) - len(missing),
        output,
        lambda endpoint: mt_bench.judge(games, endpoint, output, options["concurrency"], options["quiet"]),
        **options,
    )


@judge.command("alpaca-eval")
@click.argument("outputs", type=READ)
@click.option("--reference-outputs", required=True, type=READ, help="What the model is compared with.")
@click.option("--prompt", required=True, type=READ, help="alpaca_eval's alpaca_eval_clf.txt.")
@click.option("--output", "-o", required=True, type=WRITTEN, help="The file of annotations.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of which output is shown first.")
@judged
def judge_alpaca_eval(
    outputs: Path, reference_outputs: Path, prompt: Path, output: Path, seed: int, **options: Any
) -> None:
    """Compare a model's outputs with reference outputs, weighted by how sure the judge is (AlpacaEval 2).

    The judge must return log-probabilities. OUTPUT is alpaca_eval's annotations.json; win rate and standard error
    are computed here. The length-controlled win rate needs data that alpaca_eval downloads; it computes it from
    OUTPUT, if that has all 805 instructions in their order:

    \b
      python -c "import pandas, alpaca_eval.metrics as metrics; \\
        annotations = pandas.read_json('VaRM/annotations.json'); \\
        print(metrics.get_length_controlled_winrate(annotations, save_weights_dir=None))"

    \b
    Example:
      varm-merge evaluate judge alpaca-eval VaRM/outputs.json --reference-outputs alpaca_eval_gpt4_baseline.json \\
        --prompt alpaca_eval_clf.txt --judge gpt-4-1106-preview --output VaRM/annotations.json
    """
    from varm_merge.evaluation import alpaca_eval

    pairs = alpaca_eval.pairs(outputs, reference_outputs)
    messages = alpaca_eval.read_prompt(prompt)
    there = alpaca_eval.there(pairs, messages, options["judge_model"], seed, output)
    asked = alpaca_eval.unequal(pairs)
    missing = [pair for pair in asked if pair.number not in there]
    _judge(
        alpaca_eval.load(missing, messages, seed),
        len(asked) - len(missing),
        output,
        lambda endpoint: alpaca_eval.annotate(
            pairs, messages, endpoint, output, options["concurrency"], seed, options["quiet"]
        ),
        **options,
    )


def _judge(
    load: "Load",
    there: int,
    output: Path,
    work: "Callable[[Endpoint], Judged]",
    *,
    judge_model: str,
    url: str,
    price_in: float | None,
    price_out: float | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Say what it costs, do it, say what it has cost."""
    if (price_in is None) != (price_out is None):
        raise click.UsageError("--price-in and --price-out go together")
    prices = None if price_in is None or price_out is None else (price_in, price_out)
    told: dict[str, Any] = {"output": str(output), "estimate": vars(load)}
    if prices:
        told["estimated_price"] = load.price(*prices)
    click.echo(f"{load.requests} requests to {judge_model} at {url}; {there} judgments are there", err=as_json)
    if load.requests:
        price = f", at most {_dollars(load.price(*prices))}" if prices else ""
        click.echo(
            f"about {load.prompt_tokens:,} prompt tokens (a token for every 4 bytes), at most "
            f"{load.completion_tokens:,} completion tokens{price}",
            err=as_json,
        )
    if dry_run:
        if as_json:
            click.echo(json.dumps(told, indent=1))
        return
    endpoint = _endpoint(url, judge_model, **options)
    if load.requests:
        endpoint.open()
        if not yes:
            click.confirm("Start? (--yes does not ask)", abort=True, err=True)
    outcome = work(endpoint)
    if as_json:
        told |= {**vars(outcome), "used": vars(endpoint.used)}
        if prices:
            told["price"] = endpoint.used.price(*prices)
        click.echo(json.dumps(told, indent=1))
    else:
        _tell_judged(outcome, output, endpoint, prices)
    sys.exit(1 if outcome.failed else 0)


def _tell_judged(
    outcome: "Judged", output: Path, endpoint: "Endpoint", prices: tuple[float, float] | None
) -> None:
    _tell_failures(outcome.failed)
    used = endpoint.used
    if used.requests:
        price = f", {_dollars(used.price(*prices))}" if prices else ""
        click.echo(
            f"{outcome.asked} judged; the endpoint counted {used.prompt_tokens:,} prompt tokens and "
            f"{used.completion_tokens:,} completion tokens{price}"
        )
        if used.uncounted:
            click.secho(f"! of {used.uncounted} replies it told no tokens", fg="yellow")
    if outcome.unrated:
        click.secho(f"! judgments without a rating, which are in no average: {outcome.unrated}", fg="yellow")
    if not outcome.failed:
        click.secho(f"✓ {output}", fg="green")


def _dollars(price: float) -> str:
    return f"${price:.2f}" if price >= 1 else f"${price:.4f}"


SHOWN = 10
"""Failures that are told; the others are counted."""


def _tell_failures(failed: dict[str, str]) -> None:
    for what, why in list(failed.items())[:SHOWN]:
        click.secho(f"✗ {what}: {why}", fg="red", err=True)
    if len(failed) > SHOWN:
        click.secho(f"✗ and {len(failed) - SHOWN} more", fg="red", err=True)
    if failed:
        click.secho(f"✗ {len(failed)} are missing; the same command asks these alone", fg="red", err=True)


def _endpoint(url: str, model: str, **options: Any) -> "Endpoint":
    from varm_merge.evaluation.endpoint import Endpoint

    return Endpoint(url, model, **{key: options[key] for key in CLIENT})


@evaluate.command()
@click.argument("files", nargs=-1, required=True, type=READ)
@click.option("--questions", type=READ, help="MT-Bench's question.jsonl, for the categories.")
@click.option("--baseline", help="A model of MT-Bench that the others are compared with, in percent.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def results(files: tuple[Path, ...], questions: Path | None, baseline: str | None, as_json: bool) -> None:
    """Show judgments: MT-Bench by category and turn, as in the papers, or the win rates of AlpacaEval.

    FILES are judgments of MT-Bench, or annotations of AlpacaEval, one file for each model; FastChat's and
    alpaca_eval's own are read as well.

    \b
    Examples:
      varm-merge evaluate results model_judgment/gpt-4_single.jsonl --questions question.jsonl --baseline CLM
      varm-merge evaluate results CLM/annotations.json VaRM/annotations.json
    """
    from varm_merge.evaluation import results as made

    kinds = {made.is_alpaca_eval(path) for path in files}
    if len(kinds) > 1:
        raise click.UsageError("judgments of MT-Bench and annotations of AlpacaEval are shown one after the other")
    if kinds == {True}:
        if questions or baseline:
            raise click.UsageError("--questions and --baseline are for MT-Bench")
        found = made.alpaca_eval(files)
    else:
        found = made.mt_bench(files, questions, baseline)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for table in made.tables(found):
        show(*table)
    for remark in made.remarks(found):
        click.secho(f"! {remark}", fg="yellow")
