"""``varm-merge evaluate``: answer MT-Bench and AlpacaEval 2, have the answers judged, show tables."""

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from varm_common.console import talks
from varm_common.tables import show
from varm_merge.commands.flags import COUNT, POSITIVE, READ, WRITTEN, Command, flag, option, with_options

if TYPE_CHECKING:
    from varm_merge.evaluation.collect import Judging, Outcome
    from varm_merge.evaluation.endpoint import Endpoint, Usage

__all__ = ["evaluate"]

AMOUNT = click.FloatRange(min=0)
DTYPE = click.Choice(["auto", "float32", "bfloat16", "float16"])
LOCAL = ("revision", "device", "dtype", "batch_size", "chat_template", "trust_remote_code")
CLIENT = ("key_variable", "timeout", "max_retries", "requests_per_minute", "tokens_per_minute")
REMOTE = (*CLIENT, "concurrency")
"""Options of a model on this machine, of the client of an endpoint, and of all requests to it."""
SAMPLING = ("max_new_tokens", "num_choices", "temperature", "seed")
CUT_ANSWERS = {
    "length": "answers cut at --max-new-tokens",
    "context": "answers cut at the end of the model's context",
    "content_filter": "answers cut by the endpoint's content filter",
    "no room": "empty answers, because the question fills the model's context",
}
"""Messages about answers that did not end by themselves."""
SHOWN = 10
"""How many failures are listed; the others are only counted."""


@click.group()
def evaluate() -> None:
    """Answer MT-Bench and AlpacaEval 2, have the answers judged, show the results.

    The file formats are those of FastChat's llm_judge and of alpaca_eval, so you can also run any step with these
    programs. If a step is interrupted, run the same command again. Exit codes: 0: all answers or judgments exist.
    1: some are missing or a problem was found, and printed. 2: bad usage.

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
    """The options for requests to an endpoint."""
    key_help = (
        "Environment variable with the endpoint's key.  [default: OPENAI_API_KEY for api.openai.com; no other "
        "endpoint is sent a key]"
    )
    requests_help = "Maximum number of requests per minute, repeated ones included."
    tokens_help = "Maximum number of tokens per minute: estimated prompt plus longest possible answer."
    retries_help = "How often a request is repeated after a timeout, status 429 or 5xx, or a broken reply."
    return with_options(
        option(f"--{prefix}key-env", "key_variable", metavar="NAME", help=key_help),
        option("--timeout", type=POSITIVE, default=120, help="Seconds that one request may take."),
        option("--max-retries", type=click.IntRange(min=0), default=8, help=retries_help),
        option("--concurrency", type=COUNT, default=4, help="Number of requests at the same time."),
        option("--requests-per-minute", type=POSITIVE, help=requests_help),
        option("--tokens-per-minute", type=POSITIVE, help=tokens_help),
    )


output_option = partial(option, "--output", "-o", required=True, type=WRITTEN)
OPENAI = "https://api.openai.com/v1"
with_json = flag("--json", "as_json", help="Print the result as JSON.")
with_judge = with_options(
    option("--judge", "judge_model", required=True, help="Name of the judge model at the endpoint."),
    option("--judge-url", "url", default=OPENAI, help="URL of the endpoint, without /chat/completions."),
    through_endpoint("judge-"),
    option("--price-in", type=AMOUNT, help="Dollars per million prompt tokens."),
    option("--price-out", type=AMOUNT, help="Dollars per million answer tokens."),
    flag("--yes", "-y", help="Start without asking for confirmation."),
    flag("--dry-run", help="Estimate the cost and send nothing."),
    with_json,
    talks(libraries=False),
)
"""The options of a command that queries a judge."""


@evaluate.command()
@click.argument("model")
@option("--questions", required=True, type=READ, help="MT-Bench's question.jsonl or AlpacaEval's JSON.")
@output_option(help="File of answers to write.")
@option("--name", help="Name of the model in the file.  [default: the last part of MODEL]")
@option("--max-new-tokens", type=COUNT, default=1024, help="Maximum length of an answer, in tokens.")
@option(
    "--num-choices",
    type=COUNT,
    default=1,
    help="Number of answers to each question of MT-Bench; judges read only the first.",
)
@option(
    "--temperature", type=AMOUNT, help="Sampling temperature.  [default: FastChat's by category; 0 for AlpacaEval]"
)
@option("--seed", type=int, default=0, help="Seed of the sampling.")
@option(
    "--batch-size",
    type=COUNT,
    default=16,
    help="Number of answers generated at the same time; halved when memory runs out.",
)
@option("--device", default="auto", help="cpu, cuda:1, …; auto: all accelerators.")
@option("--dtype", type=DTYPE, default="auto", help="Dtype of the weights. auto: the checkpoint's.")
@option("--chat-template", type=READ, help="A Jinja file that replaces the model's template.")
@option("--revision", help="Revision of a model on the Hub.")
@flag("--trust-remote-code", help="Run code that comes with the model.")
@option(
    "--url",
    "--server-url",
    "url",
    help="Query MODEL at this OpenAI-compatible endpoint (vLLM, …); the URL without /chat/completions.",
)
@through_endpoint("")
@with_json
@talks(libraries=False)
def answers(
    model: str, questions: Path, output: Path, url: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Answer the questions of MT-Bench or of AlpacaEval, depending on the file of --questions.

    MODEL is a folder, a Hub id, or with --url a model's name at the endpoint. The model's own chat template is
    used, and the second turn of a question continues from the model's first answer. Sampling uses FastChat's
    temperatures, and top-k (default 50) and top-p from the generation config. A sampled answer depends on seed,
    question and turn, not on the batch. If a run is interrupted, run the same command again; OUTPUT appears when
    all answers are complete. OUTPUT.settings.json records the model and the settings; a run with different ones is
    refused.

    \b
    Examples:
      varm-merge evaluate answers merged/ --questions question.jsonl --output model_answer/VaRM.jsonl
      varm-merge evaluate answers merged/ --questions alpaca_eval.json --output VaRM/outputs.json --name VaRM
      varm-merge evaluate answers VaRM --url http://localhost:8000/v1 --concurrency 16 \\
        --questions question.jsonl --output model_answer/VaRM.jsonl
    """
    from varm_merge.evaluation.answers import Settings, answer_at_endpoint, write_answers
    from varm_merge.evaluation.questions import read_questions

    _refuse_unused(LOCAL if url else REMOTE, "has no effect with --url" if url else "needs --url")
    file = read_questions(questions)
    if options["num_choices"] > 1 and file.benchmark == "AlpacaEval":
        raise click.UsageError("--num-choices is for MT-Bench: AlpacaEval's file has one output per instruction")
    folder = Path(model).resolve() if Path(model).is_dir() else Path(model)
    settings = Settings(options["name"] or folder.name, *(options[key] for key in SAMPLING))
    if url is None:
        from varm_merge.evaluation.local import LocalModel, answer_locally

        own = {key: options[key] for key in (*LOCAL, "max_new_tokens")}
        local = LocalModel(model, warn=partial(_warn, err=True), **own)
        identity, answer = local.about(), partial(answer_locally, file.questions, settings, local)
    else:
        endpoint, identity = _endpoint(url, model, options), {"endpoint": url, "model": model}
        answer = partial(answer_at_endpoint, file.questions, settings, endpoint, options["concurrency"])
    outcome, ends = write_answers(file, settings, identity, answer, output, quiet)
    if as_json:
        counts = {"there": outcome.there, "answered": outcome.new, "failed": outcome.failed, "ends": ends}
        click.echo(json.dumps({"output": str(output), "benchmark": file.benchmark, **counts}, indent=1))
    else:
        before = f", {outcome.there} before" if outcome.there else ""
        click.echo(f"{file.benchmark}: {outcome.new} of {len(file.questions)} questions answered{before}")
        for end in filter(ends.get, CUT_ANSWERS):
            _warn(f"{CUT_ANSWERS[end]}: {ends[end]}")
        _show_end(outcome, output)
    sys.exit(1 if outcome.failed else 0)


def _endpoint(url: str, model: str, options: Mapping[str, Any]) -> "Endpoint":
    from varm_merge.evaluation.endpoint import Endpoint

    return Endpoint(url, model, **{key: options[key] for key in CLIENT})


def _refuse_unused(names: tuple[str, ...], why: str) -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.BadOptionUsage(name, f"{parameter.opts[0]} {why}")


@judge.command("mt-bench")
@click.argument("answers", nargs=-1, required=True, type=READ)
@option("--questions", required=True, type=READ, help="MT-Bench's question.jsonl.")
@option("--prompts", required=True, type=READ, help="FastChat's judge_prompts.jsonl.")
@option("--references", type=READ, help="Reference answers, FastChat's reference_answer/….jsonl.")
@output_option(help="File of judgments to write; new judgments are added to existing ones.")
@with_judge
def judge_mt_bench(
    answers: tuple[Path, ...], questions: Path, prompts: Path, output: Path, quiet: bool, **options: Any
) -> None:
    """Rate each turn of each answer from 1 to 10 (single-answer grading), at temperature 0.

    ANSWERS are files of answers, one for each model; the file's name is the model's name. For math, reasoning and
    coding, the judge is shown a reference answer. OUTPUT has FastChat's keys and grows line by line; judgments in
    it are not requested again. As with FastChat, a judgment without [[rating]] (or [rating]) is kept with the
    score -1 and does not count in averages. Remove its line to have it judged again.

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
    from varm_merge.evaluation.questions import read_questions

    games = mt_bench.games(read_questions(questions), answers, prompts, options["references"])
    with mt_bench.judgments(games, options["judge_model"], output) as judging:
        _judge(judging, output, quiet, **options)


@judge.command("alpaca-eval")
@click.argument("outputs", type=READ)
@option("--reference-outputs", required=True, type=READ, help="File of the outputs to compare with.")
@option("--prompt", required=True, type=READ, help="alpaca_eval's alpaca_eval_clf.txt.")
@output_option(help="File of annotations to write.")
@option("--seed", type=int, default=0, help="Seed of the random order in which the judge sees the two outputs.")
@with_judge
def judge_alpaca_eval(
    outputs: Path, reference_outputs: Path, prompt: Path, output: Path, seed: int, quiet: bool, **options: Any
) -> None:
    """Compare a model's outputs with reference outputs, weighted by the judge's confidence (AlpacaEval 2).

    The judge must return log-probabilities. OUTPUT is alpaca_eval's annotations.json; `evaluate results` shows its
    win rate and standard error. The length-controlled win rate needs data that alpaca_eval downloads. If OUTPUT
    has all 805 instructions in their order, alpaca_eval computes it:

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

    messages = alpaca_eval.read_prompt(prompt)
    pairs = alpaca_eval.pairs(outputs, reference_outputs, messages, seed)
    with alpaca_eval.annotations(pairs, messages, options["judge_model"], output, seed) as judging:
        _judge(judging, output, quiet, **options)


def _judge(
    judging: "Judging", output: Path, quiet: bool, *, yes: bool, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Print the estimated cost, have the judgments made, print what they cost."""
    model, url, price_in, price_out = (options[name] for name in ("judge_model", "url", "price_in", "price_out"))
    if (price_in is None) != (price_out is None):
        raise click.UsageError("give both --price-in and --price-out, or neither")

    def price(usage: "Usage") -> Any:
        return (usage.prompt_tokens * (price_in or 0) + usage.completion_tokens * (price_out or 0)) / 1e6

    def dollars(usage: "Usage", before: str) -> str:
        return "" if price_in is None else f"{before}${price(usage):.{2 if price(usage) >= 1 else 4}f}"

    estimate = judging.estimate()
    result: dict[str, Any] = {"output": str(output), "estimate": vars(estimate)}
    result |= {} if price_in is None else {"estimated_price": price(estimate)}
    click.echo(f"{estimate.requests} requests to {model} at {url}; {judging.already} judgments exist", err=as_json)
    if judging.requests:
        most = f"{estimate.prompt_tokens:,} prompt tokens (4 bytes each), at most {estimate.completion_tokens:,}"
        click.echo(f"about {most} completion tokens{dollars(estimate, ', at most ')}", err=as_json)
    outcome = None
    if not dry_run:
        endpoint = _endpoint(url, model, options) if judging.requests else None
        if endpoint and not yes:
            click.confirm("Start? (--yes skips this question)", abort=True, err=True)
        outcome = judging.run(endpoint, options["concurrency"], quiet)
        used, unrated = endpoint.used if endpoint else estimate, judging.unrated()
        result |= {"there": outcome.there, "asked": outcome.new, "unrated": unrated, "failed": outcome.failed}
        result |= {"used": vars(used)} | ({} if price_in is None else {"price": price(used)})
    if as_json:
        click.echo(json.dumps(result, indent=1))
    elif outcome:
        if used.requests:
            counted = f"{used.prompt_tokens:,} prompt tokens and {used.completion_tokens:,} completion tokens"
            click.echo(f"{outcome.new} judged; the endpoint counted {counted}{dollars(used, ', ')}")
        if used.uncounted:
            _warn(f"the endpoint did not count the tokens of {used.uncounted} replies")
        if unrated:
            _warn(f"judgments without a rating, which do not count in averages: {unrated}")
        _show_end(outcome, output)
    sys.exit(1 if outcome and outcome.failed else 0)


def _warn(message: str, err: bool = False) -> None:
    click.secho(f"! {message}", fg="yellow", err=err)


def _show_end(outcome: "Outcome", output: Path) -> None:
    if not outcome.failed:
        click.secho(f"✓ {output}", fg="green")
        return
    lines = [f"{name}: {reason}" for name, reason in list(outcome.failed.items())[:SHOWN]]
    if len(outcome.failed) > SHOWN:
        lines.append(f"and {len(outcome.failed) - SHOWN} more")
    lines.append(f"{len(outcome.failed)} are missing; run the same command again to request only these")
    for line in lines:
        click.secho(f"✗ {line}", fg="red", err=True)


@evaluate.command()
@click.argument("files", nargs=-1, required=True, type=READ)
@option("--questions", type=READ, help="MT-Bench's question.jsonl, for the categories.")
@option("--baseline", help="For MT-Bench: the model to compare the others with, in percent.")
@with_json
def results(files: tuple[Path, ...], questions: Path | None, baseline: str | None, as_json: bool) -> None:
    """Show the results of judgments: MT-Bench by category and turn, as in the papers, or AlpacaEval's win rates.

    FILES are judgments of MT-Bench, or annotations of AlpacaEval, one file for each model. Files that FastChat and
    alpaca_eval wrote work as well.

    \b
    Examples:
      varm-merge evaluate results model_judgment/gpt-4_single.jsonl --questions question.jsonl --baseline CLM
      varm-merge evaluate results CLM/annotations.json VaRM/annotations.json
    """
    from varm_merge.evaluation import results as tables

    kinds = {tables.is_alpaca_eval(path) for path in files}
    if len(kinds) > 1:
        raise click.UsageError("show judgments of MT-Bench and annotations of AlpacaEval by separate commands")
    if kinds == {True} and (questions or baseline):
        raise click.UsageError("--questions and --baseline are for MT-Bench")
    numbers = tables.alpaca_eval(files) if kinds == {True} else tables.mt_bench(files, questions, baseline)
    if as_json:
        click.echo(json.dumps(numbers, indent=1))
        return
    show(*tables.table(numbers))
    for remark in tables.remarks(numbers):
        _warn(remark)
