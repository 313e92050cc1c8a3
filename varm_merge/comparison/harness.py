"""Run lm-evaluation-harness. These functions run in processes of their own: the harness takes seconds to import.

It also takes ten seconds or more to read its 14 000 built-in task files. `check` reads them once, if a task is not
one of the user's own, and notes the folders of the files that each task consists of. `evaluate` reads only those.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from varm_common.errors import UserError, closest, reason_of
from varm_merge.comparison.backends import CHAT, VLLM
from varm_merge.comparison.suites import Task
from varm_merge.comparison.tasks import Tasks

__all__ = ["PRELOAD", "Run", "answer_tokens", "check", "evaluate", "measures"]

PRELOAD = ("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.models.openai_completions")
RESULTS = ("results", "groups", "higher_is_better", "n-samples", "n-shot")
"""The parts of the harness's results that are used."""
GENERATE = "generate_until"
PROMPT_TOKENS = 1024
LEAST_TIMEOUT_S, LEAST_TOKENS_PER_S = 300, 5
"""How long a server may take for an answer."""
ON_CPU, AT_ONCE = 8, 16
"""The batch size on a CPU, and the number of requests to a server at a time, for ``auto``."""


@dataclass(frozen=True)
class Leaf:
    """A task without subtasks: its settings, and the file of each."""

    name: str
    settings: Mapping[str, Any]
    file: Path | None


@dataclass(frozen=True)
class Run:
    """A model, and how it is run.

    Attributes:
        model: Its folder.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        trust_remote_code: Whether code in its folder may run.
        url: Its server, without ``/completions``.
        served_name: Its name there.
        length: Its context length in tokens, if its config names one.
    """

    model: Path
    device: str | None = None
    trust_remote_code: bool = False
    url: str = ""
    served_name: str = ""
    length: int | None = None


# Before the first merge


def check(tasks: Tasks, output: Path) -> None:
    """End this process with an error if a task cannot run as it is asked for.

    Otherwise write, as JSON by task, the ``folders`` of its files, and whether it ``runs_code``.
    """
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=tasks.include_path, include_defaults=False).task_index
    try:
        leaves = {task.label: list(_leaves(task.name, index)) for task in tasks.tasks}
    except KeyError:
        index = TaskManager(include_path=tasks.include_path).task_index
        names = [task.name for task in tasks.tasks if not Path(task.name).is_file()]
        if unknown := [name for name in names if name not in index]:
            similar = ((name, closest(name, index)) for name in unknown)
            shown = (f"`{name}`" + (f" (did you mean `{other}`?)" if other else "") for name, other in similar)
            sys.exit(f"Error: lm-evaluation-harness knows no task {', '.join(shown)}")
        try:
            leaves = {task.label: list(_leaves(task.name, index)) for task in tasks.tasks}
        except KeyError as error:
            sys.exit(f"Error: a task consists of {error}, which lm-evaluation-harness does not know")
    if problems := [*_problems(tasks, leaves)]:
        sys.exit(f"Error: {'; '.join(problems)}")
    known = {label: {"folders": _folders(own), "runs_code": _runs_code(own)} for label, own in leaves.items()}
    output.write_text(json.dumps(known), encoding="utf-8")


def _leaves(name: Any, index: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> Iterator[Leaf]:
    """The tasks that a task, group, tag, file or entry of a group consists of; groups are leaves without settings.

    Raises:
        KeyError: One is not in the harness's index.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    over = dict(over or {})
    if isinstance(name, Mapping):  # an entry of a group, which changes settings or is defined in place
        over |= {key: value for key, value in name.items() if key not in ("task", "group")}
        inner = name.get("group", name.get("task"))
        if inner not in index and isinstance(name.get("task"), list):
            for entry in name["task"]:
                yield from _leaves(entry, index, over)
        elif inner not in index and len(name) > 1:
            yield Leaf(str(inner), over, None)
        else:
            yield from _leaves(inner, index, over)
        return
    if name not in index and Path(name).is_file():
        file: Path | None = Path(name).resolve()
        settings = load_yaml(name, resolve_func=False)
    else:
        entry = index[name]
        file, settings = entry.yaml_path, entry.cfg or {}
        if file is None:
            for member in sorted(entry.tags):
                yield from _leaves(member, index, over)
            return
    if isinstance(settings.get("task"), list):
        yield Leaf(str(name), {}, file)
        own = {key: value for key, value in settings.items() if key in ("num_fewshot", "unsafe_code")}
        for member in settings["task"]:
            yield from _leaves(member, index, {**own, **over})
    else:
        yield Leaf(str(settings.get("task", name)), {**settings, **over}, file)


def _folders(leaves: Sequence[Leaf]) -> list[str]:
    """The folders of the task files, without those that lie in another."""
    folders = {leaf.file.resolve().parent for leaf in leaves if leaf.file}
    return sorted(str(folder) for folder in folders if not folders.intersection(folder.parents))


def _runs_code(leaves: Sequence[Leaf]) -> bool:
    return any(leaf.settings.get("unsafe_code", False) is not False for leaf in leaves)


def _problems(tasks: Tasks, leaves: Mapping[str, Sequence[Leaf]]) -> Iterator[str]:
    """Why tasks cannot run as they are asked for; the harness would say it after hours, or ignore the setting."""
    for task in tasks.tasks:
        own = leaves[task.label]
        if not tasks.allow_code and _runs_code(own):
            yield f"{task.label} runs code that the models write: add --allow-code-execution, or leave it out"
            continue
        if task.shots and (fixed := [leaf for leaf in own if leaf.settings.get("num_fewshot") == 0]):
            why = f"its file fixes the examples of {fixed[0].name} at 0"
            yield f"{task.label}: {why}, and the harness would ignore another number; name it `{task.name}:0`"
        likelihood = [leaf.name for leaf in own if leaf.settings.get("output_type", GENERATE) != GENERATE]
        if tasks.backend == CHAT and likelihood:
            yield f"{task.label} compares likelihoods ({likelihood[0]}), which --backend {CHAT} cannot give"
        yield from (f"{task.label}: {problem}" for problem in _import_problems(own))


def _import_problems(leaves: Sequence[Leaf]) -> Iterator[str]:
    """What the code of a task needs and is not installed; the first such problem."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in dict.fromkeys(leaf.file for leaf in leaves if leaf.file):
        try:
            load_yaml(file)
        except Exception as error:  # whatever the task's code raises
            yield f"its code in {file.parent} cannot be loaded: {reason_of(error)}"
            return


# Scores


def evaluate(tasks: Tasks, task: Task, folders: Sequence[str], run: Run, output: Path) -> None:
    """Score a model on a task and write the harness's results as JSON.

    A NaN, or a server all of whose replies lack a text, ends this process with an error.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    is_file = task.name.endswith(".yaml")
    results = simple_evaluate(
        **_model(tasks, task, run),
        tasks=[str(Path(task.name).absolute()) if is_file else task.name],
        task_manager=TaskManager(include_path=list(folders), include_defaults=False),
        num_fewshot=task.shots,
        limit=tasks.limit,
        gen_kwargs={"max_gen_toks": answer_tokens(task, run.length)} if task.max_tokens else None,
        apply_chat_template=task.chat or tasks.backend == CHAT,
        confirm_run_unsafe_code=tasks.allow_code,
        log_samples=True,
    )
    replies = [sample["resps"] for samples in results["samples"].values() for sample in samples]
    if any(map(_has_nan, replies)):
        sys.exit("Error: the model gives NaN as likelihoods: its weights or its arithmetic are not finite")
    if tasks.backend == CHAT and not any(text for texts in replies for text in chain(*texts)):
        sys.exit("Error: no reply of the server has a text; the harness's warnings say what it sent")
    output.write_text(json.dumps({name: results.get(name) for name in RESULTS}, default=str), encoding="utf-8")


def answer_tokens(task: Task, length: int | None) -> int:
    """The most tokens of an answer. The prompt keeps ``PROMPT_TOKENS``, or half of a short context."""
    most = task.max_tokens or 0
    return most if length is None else min(most, length - min(length // 2, PROMPT_TOKENS))


def _adds_bos(run: Run, chat: bool) -> bool:
    """Whether a text has to get the model's BOS token: its tokenizer adds one, and no chat template has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.model, trust_remote_code=run.trust_remote_code)
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return False
    turns = [{"role": "user", "content": "a"}]
    return not (chat and tokenizer.apply_chat_template(turns, tokenize=False).startswith(tokenizer.bos_token))


def _model(tasks: Tasks, task: Task, run: Run) -> dict[str, Any]:
    """The arguments of ``simple_evaluate`` that say which model runs where."""
    import torch
    from lm_eval.utils import simple_parse_args_string

    arguments = simple_parse_args_string(tasks.model_args)
    automatic = tasks.batch_size == "auto"
    if tasks.served:
        chat = tasks.backend == CHAT
        model: dict[str, Any] = {
            "model": run.served_name,
            "base_url": f"{run.url}{'/chat' if chat else ''}/completions",
            "num_concurrent": AT_ONCE if automatic else int(tasks.batch_size),
            "timeout": max(LEAST_TIMEOUT_S, (task.max_tokens or 0) // LEAST_TOKENS_PER_S),
        }
        if not chat:
            model |= {"tokenizer": str(run.model), "tokenizer_backend": "huggingface"}
            model |= {"trust_remote_code": run.trust_remote_code, "add_bos_token": _adds_bos(run, task.chat)}
            model |= {} if run.length is None else {"max_length": run.length}
        name = "local-chat-completions" if chat else "local-completions"
        return {"model": name, "model_args": {**model, **arguments}, "batch_size": 1}
    device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = {"pretrained": str(run.model), "trust_remote_code": run.trust_remote_code, **arguments}
    if tasks.backend == VLLM:
        return {"model": "vllm", "model_args": model, "batch_size": tasks.batch_size}
    batch_size = ON_CPU if automatic and device == "cpu" else tasks.batch_size
    return {"model": "hf", "model_args": model, "batch_size": batch_size, "device": device}


def _has_nan(responses: Any) -> bool:
    """The harness would give a score to a model that answers NaN: it takes the first choice as the likeliest."""
    if isinstance(responses, (list, tuple)):
        return any(map(_has_nan, responses))
    return isinstance(responses, float) and math.isnan(responses)


def measures(results: Mapping[str, Any], first: str | None = None) -> list[dict[str, Any]]:
    """Each metric of each task in the harness's results; the metric ``first`` before the others.

    Raises:
        UserError: A number is not finite.
    """
    return sorted(_measures(results), key=lambda measure: bool(measure["metric"] != first))


def _measures(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    groups = results.get("groups") or {}
    for task, metrics in {**results["results"], **groups}.items():
        higher_is_better = results.get("higher_is_better", {}).get(task) or {}
        for name, value in metrics.items():
            metric, comma, which = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                raise UserError(f"{metric} is not finite: are there NaN or Inf in the weights?")
            error = metrics.get(f"{metric}_stderr,{which}")
            yield {
                "task": task,
                "metric": metric if which == "none" else f"{metric} ({which})",
                "value": value,
                "standard_error": error if isinstance(error, (int, float)) and math.isfinite(error) else None,
                "higher_is_better": bool(higher_is_better.get(metric, True)),
                "samples": (results.get("n-samples", {}).get(task) or {}).get("effective"),
                "shots": (results.get("n-shot") or {}).get(task),
                "group": task in groups,
            }
