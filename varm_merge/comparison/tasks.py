"""Score models on tasks of lm-evaluation-harness, each model and task in a process of its own.

The harness takes seconds to read its 13 000 built-in task files. They are read only for a task that is not one of
the user's own.
"""

import glob
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError, closest
from varm_merge.comparison.cache import state_of

__all__ = ["PRELOAD", "Tasks", "check", "evaluate", "measures"]

PRELOAD = ("lm_eval.evaluator", "lm_eval.models.huggingface")
HARNESS = "lm-eval"
RESULTS = ("results", "groups", "higher_is_better", "n-samples")
"""The parts of the harness's results that are used."""
DATA_KEYS = ("dataset_path", "data_dir", "data_files")
"""Keys of a task file that may name local data."""


@dataclass(frozen=True)
class Tasks:
    """The tasks, and the settings of the harness for them."""

    names: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: str = "8"
    chat_template: bool = False

    def demand(self) -> None:
        """Check that the harness is installed.

        Raises:
            UserError: It is not.
        """
        if any(find_spec(name) is None for name in ("lm_eval", "peft")):
            raise UserError("--tasks needs lm-evaluation-harness: pip install 'varm-merge[eval]'")

    def inputs(self, task: str) -> dict[str, Any]:
        """Everything that the scores of a task depend on, besides the model: settings, files, and the harness."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("names", "include_path")}
        own_folder = Path(task).parent if task.endswith(".yaml") else None
        folders = [folder for folder in (self.include_path, own_folder) if folder]
        files = {file.resolve() for folder in folders for file in folder.rglob("*") if _counts(file)}
        for file in [file for file in files if file.suffix in (".yaml", ".yml")]:
            files |= {named.resolve() for named in _named_files(file)}
        try:
            harness = version(HARNESS)
        except PackageNotFoundError:
            harness = "not installed"
        local = state_of(files) if files else None
        return {"task": task, "local": local, "settings": settings, HARNESS: harness}


# Files that a task depends on


def _counts(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _named_files(task: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The local data that a task file names, the task files that it includes, and what those name."""
    try:
        stack = [yaml.load(task.read_text(encoding="utf-8"), Loader=_WithoutTags)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return
    seen |= {task.resolve()}
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            stack += node.values()
            for name in _strings([node.get(key) for key in DATA_KEYS]):
                yield from _matching_files(name)
            for included in _strings(node.get("include")):
                file = task.parent / Path(included).expanduser()
                if file.is_file() and file.resolve() not in seen:
                    yield from (file, *file.parent.glob("*.py"))  # code that it calls
                    yield from _named_files(file, seen)


def _matching_files(name: str) -> Iterator[Path]:
    """The files that a file name, a folder or a pattern stands for."""
    matches = [name] if Path(name).exists() else glob.glob(name, recursive=True)  # noqa: PTH207  may be absolute
    for path in map(Path, matches):
        yield from filter(_counts, path.rglob("*") if path.is_dir() else [path])


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield from [content] if content else []
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)


class _WithoutTags(yaml.SafeLoader):
    """Reads YAML and ignores its tags, such as ``!function``, so no code of a task runs."""


_WithoutTags.add_multi_constructor("!", lambda _loader, _tag, _node: None)


# The harness, imported only in the process that runs it


def check(tasks: Sequence[str], folder: Path | None) -> None:
    """End this process with an error if the harness does not know all tasks."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=folder, include_defaults=False).all_tasks
    others = [task for task in tasks if task not in own and not Path(task).is_file()]
    known = [*own, *TaskManager(include_path=folder).all_tasks] if others else []
    unknown = []
    for task in others:
        if task not in known:
            similar = closest(task, known)
            unknown.append(f"`{task}`" + (f" (did you mean `{similar}`?)" if similar else ""))
    if unknown:
        sys.exit(f"Error: lm-evaluation-harness knows no task {', '.join(unknown)}")


def evaluate(
    tasks: Tasks, task: str, model: Path, device: str | None, trust_remote_code: bool, output: Path
) -> None:
    """Score a model on a task and write the harness's results as JSON; a NaN ends this process with an error."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks.include_path, include_defaults=False)
    is_file = task.endswith(".yaml")
    if not is_file and task not in manager.all_subtasks:
        manager = TaskManager(include_path=tasks.include_path)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "trust_remote_code": trust_remote_code},
        tasks=[str(Path(task).absolute()) if is_file else task],
        task_manager=manager,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        batch_size=tasks.batch_size,
        apply_chat_template=tasks.chat_template,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        log_samples=True,
    )
    if any(_has_nan(sample["resps"]) for samples in results["samples"].values() for sample in samples):
        sys.exit("Error: the model gives NaN as likelihoods: its weights or its arithmetic are not finite")
    output.write_text(json.dumps({name: results.get(name) for name in RESULTS}, default=str), encoding="utf-8")


def _has_nan(responses: Any) -> bool:
    """The harness would give a score to a model that answers NaN: it takes the first choice as the likeliest."""
    if isinstance(responses, (list, tuple)):
        return any(map(_has_nan, responses))
    return isinstance(responses, float) and math.isnan(responses)


def measures(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each metric of each task in the harness's results.

    Raises:
        UserError: A number is not finite.
    """
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
                "group": task in groups,
            }
