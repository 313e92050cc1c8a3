"""Score models on held-out text and on tasks, each model in a process of its own.

Held-out text is scored by ``fusion-trainer``. It is rendered and split once, with the pivot's template and
tokenizer, so that all models are scored on the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from varm_common.forked import run_forked, run_module
from varm_common.standard_errors import difference
from varm_merge.comparison import harness
from varm_merge.comparison.cache import state_of
from varm_merge.comparison.suites import Task
from varm_merge.comparison.tasks import Tasks

__all__ = ["HeldOut", "Scorers", "differences", "environment", "text_config"]

MOST_TOKENS, LEAST_TOKENS = 2048, 16
"""Tokens of the pivot in a block of held-out text; fewer than the most if its context is shorter."""
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
"""Names of a model's context length in its config."""
SCORES = 2
"""The version of the scores of a model that are stored; since 2 they have the sums of each conversation."""
RATIOS = {"nats_per_byte": ("nats", "bytes"), "exact_match": ("matched", "rows")}
"""The scores, and the two sums that each is the ratio of."""
PRELOAD = ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
"""Modules that transformers imports to load a model."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out data for ``fusion-trainer prepare``, and the template to render it with."""

    data: tuple[str, ...]
    template: str | None = None

    def inputs(self) -> dict[str, Any]:
        """Everything that the prepared text depends on, besides the pivot."""

        def content(name: str) -> str:
            path = Path(name)
            if path.is_dir():
                return state_of(file for file in path.rglob("*") if file.is_file())
            return state_of([path]) if path.is_file() else name

        return {
            "data": [content(name) for name in self.data],
            "template": content(self.template) if self.template else None,
            "scores": SCORES,
            "varm-merge": version("varm-merge"),
        }


@dataclass(frozen=True)
class Scorers:
    """Runs the programs that score models.

    Attributes:
        folder: For the prepared text and the results of a run.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        trust_remote_code: Whether code of the model repositories may run.
        with_tasks: Whether tasks will be scored, so that the harness is worth importing once for all.
    """

    folder: Path
    device: str | None
    trust_remote_code: bool
    with_tasks: bool

    def prepare(self, held_out: HeldOut, pivot: Path, inputs: Mapping[str, Any], log: Path) -> Path:
        """Render and tokenise the text, unless this was done before; the folder of the dialogues.

        Raises:
            CommandError: The data, the template or the tokenizer cannot be used.
        """
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        folder = self.folder / f"dialogues-{digest[:12]}"
        if not folder.exists():
            length = max(LEAST_TOKENS, min(MOST_TOKENS, context_length(pivot) or MOST_TOKENS))
            data = [part for name in held_out.data for part in ("--data", name)]
            template = ["--template", held_out.template] if held_out.template else []
            where = ["--pivot", str(pivot), "--dialogues", str(folder), "--max-length", str(length)]
            self._fusion_trainer("prepare", *data, *where, *template, log=log)
        return folder

    def held_out(self, model: Path, dialogues: Path, log: Path) -> dict[str, Any]:
        """Loss per byte and exact matches: ``groups``, and the sums of each of ``conversations``.

        Raises:
            CommandError: The model cannot be scored, or its loss is not finite.
        """
        output = self._output()
        where = ["--model", str(model), "--dialogues", str(dialogues), "--output", str(output)]
        self._fusion_trainer("evaluate", *where, log=log)
        scores = json.loads(output.read_text(encoding="utf-8"))
        return {"groups": scores["groups"], "conversations": scores["conversations"]}

    def check_tasks(self, tasks: Tasks, log: Path) -> dict[str, Any]:
        """Check that all tasks can run as they are asked for; what ``harness.check`` writes.

        Raises:
            CommandError: One cannot.
        """
        output = self._output()
        self._run(harness.check, tasks, output, log=log, tasks=tasks)
        return dict(json.loads(output.read_text(encoding="utf-8")))

    def task(
        self, tasks: Tasks, task: Task, folders: Sequence[str], name: str, model: Path, log: Path
    ) -> dict[str, Any]:
        """The ``measures`` of a task, or of a group or tag of tasks.

        Args:
            tasks: The settings of all tasks.
            task: The task.
            folders: The folders of its files.
            name: The name of the model in the report.
            model: The folder of the model.
            log: For the output of the harness.

        Raises:
            CommandError: The harness failed, or the model answers NaN.
            UserError: A number is not finite, or the server does not have the model.
        """
        run = harness.Run(model, self.device, self.trust_remote_code, length=context_length(model))
        if tasks.served:
            url, served_name = tasks.servers.url(name) or "", tasks.servers.served_name(name, model)
            run = replace(run, url=url, served_name=served_name)
        output = self._output()
        self._run(harness.evaluate, tasks, task, folders, run, output, log=log, tasks=tasks)
        results = json.loads(output.read_text(encoding="utf-8"))
        return {"measures": harness.measures(results, first=task.metric)}

    def _output(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        output = self.folder / "scores.json"
        output.unlink(missing_ok=True)
        return output

    def _fusion_trainer(self, *arguments: str, log: Path) -> None:
        trust = ["--trust-remote-code"] if self.trust_remote_code else []
        self._run(run_module, "fusion_trainer", *arguments, *trust, log=log)

    def _run(self, function: Callable[..., Any], *arguments: Any, log: Path, tasks: Tasks | None = None) -> None:
        preload = [*PRELOAD, *(harness.PRELOAD if self.with_tasks else ())]
        variables = environment(self.device)
        variables = tasks.environment(variables) if tasks else variables
        run_forked(function, *arguments, log=log, preload=preload, environment=variables)


def environment(device: str | None) -> dict[str, str]:
    """The environment variables of the programs that merge and score."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **hidden}


def context_length(model: Path) -> int | None:
    """The context length of a model in tokens; None if its config has none."""
    config = text_config(model)
    return next((config[name] for name in CONTEXT if isinstance(config.get(name), int)), None)


def text_config(model: Path) -> dict[str, Any]:
    """The part of a model's config.json that describes its language model; empty if it cannot be read."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return dict(config.get("text_config") or config)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def differences(scores: Mapping[str, Any], others: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The scores of a model minus those of another, over the same conversations.

    Args:
        scores: The results of ``Scorers.held_out`` for a model.
        others: Those of another model.
        group: A group of conversations; ``all``: every one.

    Returns:
        For each score ``[difference, its standard error]``; the error is None with a single conversation.
    """
    own, their = scores["conversations"], others["conversations"]
    names = [name for name, sums in own.items() if group in ("all", sums["group"]) and name in their]

    def sums_of(side: Mapping[str, Any], key: str) -> Sequence[float]:
        return [side[name][key] for name in names]

    return {
        score: difference(*((sums_of(side, top), sums_of(side, bottom)) for side in (own, their)))
        for score, (top, bottom) in RATIOS.items()
        if all(any(sums_of(side, bottom)) for side in (own, their))
    }
