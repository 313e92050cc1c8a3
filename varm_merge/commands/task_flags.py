"""The options of ``varm-merge compare`` that concern tasks of lm-evaluation-harness."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from varm_common.tables import markdown
from varm_merge.comparison.backends import BACKENDS

__all__ = ["comma_separated", "task_flags"]

SETTINGS = ("include_path", "limit", "batch_size", "backend", "model_args")


def comma_separated(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Comma-separated, given once or several times."""
    return tuple(dict.fromkeys(name.strip() for argument in given for name in argument.split(",") if name.strip()))


def _tasks(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names; ``list`` prints the suites and ends the command."""
    names = comma_separated(context, parameter, given)
    if names == ("list",):
        _list_suites()
        context.exit()
    return names


def _list_suites() -> None:
    from varm_merge.comparison.suites import SUITES, rows

    for suite in SUITES.values():
        chat = "; with chat templates" if any(task.chat for task in suite.tasks) else ""
        click.echo(f"{suite.name}: {suite.source}{chat}\n")
        click.echo(markdown(("benchmark", "task", "shots", "metric", "note"), list(rows(suite))) + "\n")
    click.echo("`lm-eval ls tasks` prints all other tasks. TASK:5 sets five few-shot examples.")


OPTIONS = (
    click.option(
        "--tasks",
        multiple=True,
        callback=_tasks,
        is_eager=True,
        help="Tasks of lm-evaluation-harness or suites, comma-separated; TASK:5 sets five examples. "
        "`--tasks list` prints the suites.",
    ),
    click.option(
        "--include-path",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with your own task files, for --tasks.",
    ),
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Few-shot examples per question, for tasks without a number. Default: each task's own number.",
    ),
    click.option(
        "--limit",
        type=click.FloatRange(min=0, min_open=True),
        help="For --tasks: maximum number of questions, or a share of them if below 1.",
    ),
    click.option(
        "--batch-size",
        default="auto",
        show_default=True,
        callback=lambda _context, _parameter, value: _batch_size(value),
        help="For --tasks: batch size; for a server, the number of parallel requests. auto: as large as fits on a "
        "GPU, 8 on a CPU, 16 requests.",
    ),
    click.option(
        "--chat", is_flag=True, help="Use the models' chat templates for --tasks. Suites set this themselves."
    ),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=BACKENDS[0],
        show_default=True,
        help="What runs the models for --tasks: a library, or an OpenAI-compatible server's /completions or "
        "/chat/completions.",
    ),
    click.option(
        "--model-args",
        default="",
        metavar="KEY=VALUE,…",
        help="For --tasks: options of the backend, such as dtype=bfloat16 or tensor_parallel_size=2.",
    ),
    click.option(
        "--server-url",
        multiple=True,
        metavar="NAME=URL",
        help="Server of a model, by its name in the report; may be repeated. A URL alone is for all models.",
    ),
    click.option("--server-key-env", metavar="NAME", help="Environment variable with the servers' key."),
    click.option(
        "--allow-code-execution",
        is_flag=True,
        help="Let tasks such as HumanEval run the code that the models write. It is not sandboxed.",
    ),
)


def _batch_size(value: str) -> str:
    if value != "auto" and not (value.isdigit() and int(value)):
        raise click.BadParameter(f"`{value}` is neither a number above 0 nor auto", param_hint="--batch-size")
    return value


def task_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives ``tasks``, a `Tasks` or None, in place of them."""

    @functools.wraps(command)
    def with_tasks(*arguments: Any, **values: Any) -> None:
        from varm_merge.comparison.servers import Servers
        from varm_merge.comparison.suites import missing, read
        from varm_merge.comparison.tasks import Tasks

        names, urls = values.pop("tasks"), values.pop("server_url")
        shots, chat, key_variable = (values.pop(name) for name in ("num_fewshot", "chat", "server_key_env"))
        settings = {name: values.pop(name) for name in SETTINGS}
        allow_code = values.pop("allow_code_execution")
        tasks = None
        if names:
            servers = Servers.read(urls, key_variable)
            tasks = Tasks(read(names, shots, chat), **settings, allow_code=allow_code, servers=servers)
            tasks.demand()
            for sentence in () if values.get("quiet") else missing(names):
                click.echo(sentence, err=True)
        elif urls:
            raise click.UsageError("--server-url needs --tasks")
        command(*arguments, tasks=tasks, **values)

    return functools.reduce(lambda inner, option: option(inner), reversed(OPTIONS), with_tasks)
