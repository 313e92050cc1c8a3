"""The options of ``varm-merge compare`` that concern tasks of lm-evaluation-harness."""

import functools
from collections.abc import Callable
from typing import Any

import click

from varm_common.tables import markdown
from varm_merge.commands.flags import FOLDER, POSITIVE, flag, option, with_options
from varm_merge.comparison.backends import BACKENDS

__all__ = ["task_flags", "with_commas"]

OWN = ("tasks", "server_url", "num_fewshot", "chat", "server_key_env", "allow_code_execution")
SETTINGS = ("include_path", "limit", "batch_size", "backend", "model_args")


def comma_separated(_context: click.Context, _: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Comma-separated, given once or several times."""
    return tuple(dict.fromkeys(name.strip() for argument in given for name in argument.split(",") if name.strip()))


with_commas = functools.partial(option, multiple=True, callback=comma_separated)


def _tasks(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names; ``list`` prints the suites and ends the command."""
    names = comma_separated(context, parameter, given)
    if names == ("list",):
        from varm_merge.comparison.suites import SUITES, rows

        for suite in SUITES.values():
            chat = "; with chat templates" if any(task.chat for task in suite.tasks) else ""
            click.echo(f"{suite.name}: {suite.source}{chat}\n")
            click.echo(markdown(("benchmark", "task", "shots", "metric", "note"), list(rows(suite))) + "\n")
        click.echo("`lm-eval ls tasks` prints all other tasks. TASK:5 sets five few-shot examples.")
        context.exit()
    return names


def _batch_size(_context: click.Context, _: click.Parameter, value: str) -> str:
    if value != "auto" and not (value.isdigit() and int(value)):
        raise click.BadParameter(f"`{value}` is neither a number above 0 nor auto", param_hint="--batch-size")
    return value


with_task_options = with_options(
    option(
        "--tasks",
        multiple=True,
        callback=_tasks,
        is_eager=True,
        help="Tasks of lm-evaluation-harness or suites, comma-separated; TASK:5 sets five examples. "
        "`--tasks list` prints the suites.",
    ),
    option("--include-path", type=FOLDER, help="Folder with your own task files, for --tasks."),
    option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Few-shot examples per question, for tasks without a number. Default: each task's own number.",
    ),
    option(
        "--limit", type=POSITIVE, help="For --tasks: maximum number of questions, or a share of them if below 1."
    ),
    option(
        "--batch-size",
        default="auto",
        callback=_batch_size,
        help="For --tasks: batch size; for a server, the number of parallel requests. auto: as large as fits on a "
        "GPU, 8 on a CPU, 16 requests.",
    ),
    flag("--chat", help="Use the models' chat templates for --tasks. Suites set this themselves."),
    option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=BACKENDS[0],
        help="What runs the models for --tasks: a library, or an OpenAI-compatible server's /completions or "
        "/chat/completions.",
    ),
    click.option(
        "--model-args",
        default="",
        metavar="KEY=VALUE,…",
        help="For --tasks: options of the backend, such as dtype=bfloat16 or tensor_parallel_size=2.",
    ),
    option(
        "--server-url",
        multiple=True,
        metavar="NAME=URL",
        help="Server of a model, by its name in the report; may be repeated. A URL alone is for all models.",
    ),
    option("--server-key-env", metavar="NAME", help="Environment variable with the servers' key."),
    flag(
        "--allow-code-execution",
        help="Let tasks such as HumanEval run the code that the models write. It is not sandboxed.",
    ),
)


def task_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives ``tasks``, a `Tasks` or None, in place of them."""

    @with_task_options
    @functools.wraps(command)
    def with_tasks(*arguments: Any, **values: Any) -> None:
        from varm_merge.comparison.servers import Servers
        from varm_merge.comparison.suites import missing, read
        from varm_merge.comparison.tasks import Tasks

        names, urls, shots, chat, key_variable, allow_code = (values.pop(name) for name in OWN)
        settings = {name: values.pop(name) for name in SETTINGS}
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

    return with_tasks
