"""One model on one task of lm-evaluation-harness: ``python -m varm_merge.comparison.harness asked.json out.json``.

The harness's own program reads its 13 000 built-in task files at every start. Here they are read only for a task
that is not one of the user's own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

__all__ = ["main"]

KEPT = ("results", "groups", "higher_is_better", "n-samples")


def main(settings: Path, output: Path) -> None:
    """Evaluate as ``settings`` say: ``task``, ``include_path``, and arguments of ``lm_eval.simple_evaluate``."""
    asked = json.loads(settings.read_text(encoding="utf-8"))
    task, folder = asked.pop("task"), asked.pop("include_path")
    asked["device"] = asked["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    found = simple_evaluate(
        model="hf", tasks=[task], task_manager=_index(task, folder), log_samples=False, **asked
    )
    kept = {name: found.get(name) for name in KEPT}
    output.write_text(json.dumps(kept, default=str), encoding="utf-8")


def _index(task: str, folder: str | None) -> Any:
    own = TaskManager(include_path=folder, include_defaults=False)
    is_own = task in own.all_subtasks or task.endswith(".yaml")
    return own if is_own else TaskManager(include_path=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
