"""One model on one task of lm-evaluation-harness: ``python -m varm_merge.comparison.harness asked.json out.json``.

With ``tasks`` in place of ``task`` it says which of them there are not, and asks no model.

The harness's own program reads its 13 000 built-in task files at every start. Here they are read only for a task
that is not one of the user's own.
"""

import difflib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

__all__ = ["main", "unknown"]

KEPT = ("results", "groups", "higher_is_better", "n-samples")


def unknown(tasks: Sequence[str], folder: str | None) -> Iterator[str]:
    """Those of ``tasks`` that are no file and have no name in the harness or in ``folder``, with what is near."""
    own = TaskManager(include_path=folder, include_defaults=False).all_tasks
    others = [task for task in tasks if task not in own and not Path(task).is_file()]
    known = TaskManager(include_path=folder).all_tasks if others else []
    for task in others:
        if task not in known:
            near = difflib.get_close_matches(task, [*own, *known], n=1)
            yield f"`{task}`" + (f" (did you mean `{near[0]}`?)" if near else "")


def main(settings: Path, output: Path) -> None:
    """Evaluate as ``settings`` say: ``task``, ``include_path``, and arguments of ``lm_eval.simple_evaluate``."""
    asked = json.loads(settings.read_text(encoding="utf-8"))
    folder = asked.pop("include_path")
    if "tasks" in asked:
        missing = ", ".join(unknown(asked["tasks"], folder))
        sys.exit(f"Error: lm-evaluation-harness knows no task {missing}" if missing else 0)
    task = asked.pop("task")
    asked["device"] = asked["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    found = simple_evaluate(model="hf", tasks=[task], task_manager=_index(task, folder), log_samples=True, **asked)
    if any(_has_nan(one["resps"]) for samples in found["samples"].values() for one in samples):
        sys.exit("Error: the model gives NaN as likelihoods: its weights or its arithmetic are not finite")
    kept = {name: found.get(name) for name in KEPT}
    output.write_text(json.dumps(kept, default=str), encoding="utf-8")


def _has_nan(answers: Any) -> bool:
    """A model of NaN still gets a score: the first choice is taken for the likeliest."""
    if isinstance(answers, (list, tuple)):
        return any(map(_has_nan, answers))
    return isinstance(answers, float) and math.isnan(answers)


def _index(task: str, folder: str | None) -> Any:
    own = TaskManager(include_path=folder, include_defaults=False)
    is_own = task in own.all_subtasks or task.endswith(".yaml")
    return own if is_own else TaskManager(include_path=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
