"""What a model can do: its loss on held-out text by ``fusion-trainer evaluate``, and lm-evaluation-harness tasks.

Both are programs of their own, and are met in files. The text is rendered and split once, with the pivot's
template and tokenizer, so that all models are asked the same.
"""

import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError
from varm_common.files import write_whole
from varm_common.standard_errors import difference
from varm_merge.comparison.cache import Contents
from varm_merge.comparison.programs import Program

__all__ = ["HeldOut", "Scorers", "Tasks", "differences", "environment"]

MOST_TOKENS, LEAST_TOKENS = 2048, 16
"""Of the pivot in a block of held-out text; less where its context is shorter."""
DATA = ("dataset_path", "data_dir", "data_files")
"""Keys of a task under which local data are named."""
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
HARNESS = "lm-eval"
SCORES = 2
"""Version of what is kept of a model's scores: since 2 the sums of each conversation."""
RATIOS = {"nats_per_byte": ("nats", "bytes"), "exact_match": ("matched", "rows")}
"""Scores on held-out text, and the sums whose ratio they are."""
LOADING = ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
"""What transformers imports to load a model."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out data: what ``fusion-trainer prepare`` takes, and the template to render it with."""

    data: tuple[str, ...]
    template: str | None = None

    def about(self, contents: Contents) -> dict[str, Any]:
        """What the prepared text depends on, besides the pivot."""
        found = [
            contents.fingerprint(file for file in path.rglob("*") if file.is_file()) if path.is_dir()
            else contents.fingerprint([path]) if path.is_file()
            else str(path)
            for path in map(Path, self.data)
        ]  # fmt: skip
        template = Path(self.template) if self.template else None
        rendered = contents.fingerprint([template]) if template and template.is_file() else self.template
        return {"data": found, "template": rendered, "scores": SCORES, "varm-merge": version("varm-merge")}


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness, and how they are asked."""

    names: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: str = "8"
    chat_template: bool = False

    def demand(self) -> None:
        """See that the harness is installed.

        Raises:
            UserError: It is not.
        """
        if any(find_spec(name) is None for name in ("lm_eval", "peft")):
            raise UserError("--tasks needs lm-evaluation-harness: pip install 'varm-merge[eval]'")

    def about(self, contents: Contents, task: str) -> dict[str, Any]:
        """What the scores of a task depend on, besides the model."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("names", "include_path")}
        own = Path(task) if task.endswith(".yaml") else None
        folders = [folder for folder in (self.include_path, own and own.parent) if folder]
        files = [file for folder in folders for file in sorted(folder.rglob("*")) if _is_of_a_task(file)]
        data = [path for file in files if file.suffix in (".yaml", ".yml") for path in _named_files(file)]
        local = contents.fingerprint({file.resolve() for file in (*files, *data)}) if files else None
        return {"task": task, "local": local, "settings": settings, HARNESS: _version(HARNESS)}


def _is_of_a_task(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _named_files(task: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What a task's file names here: data, and the files that it includes, with what those name."""
    try:
        stack = [yaml.load(task.read_text(encoding="utf-8"), Loader=_TagsAsNothing)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return
    seen |= {task.resolve()}
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack += one
        elif isinstance(one, dict):
            stack += one.values()
            for key in DATA:
                yield from _files(one.get(key))
            for included in _strings(one.get("include")):
                file = task.parent / Path(included).expanduser()
                if file.is_file() and file.resolve() not in seen:
                    yield from (file, *file.parent.glob("*.py"))  # code that it calls
                    yield from _named_files(file, seen)


def _files(named: Any) -> Iterator[Path]:
    """The files that are meant by names, folders and patterns."""
    for name in _strings(named):
        patterned = glob.glob(name, recursive=True)  # noqa: PTH207  # a pattern may be absolute
        for path in [Path(name)] if Path(name).exists() else map(Path, patterned):
            found = path.rglob("*") if path.is_dir() else [path]
            yield from (file for file in found if _is_of_a_task(file))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield from [content] if content else []
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)


class _TagsAsNothing(yaml.SafeLoader):
    """YAML whose tags (``!function`` in tasks) are passed over, not run."""


_TagsAsNothing.add_multi_constructor("!", lambda _loader, _tag, _node: None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: str | None) -> dict[str, str]:
    """Of the programs that evaluate."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **hidden}


class Scorers:
    """The programs that score models.

    Args:
        folder: Where they work.
        device: ``cpu``, ``cuda``, or what they find.
        trust_remote_code: Whether code of the models' repositories may run.
    """

    def __init__(self, folder: Path, device: str | None, trust_remote_code: bool) -> None:
        self.folder, self.device, self.trust_remote_code = folder, device, trust_remote_code
        around = environment(device)
        harness = ["lm_eval.evaluator", "lm_eval.models.huggingface", *LOADING]
        self._trainer = Program("fusion_trainer", LOADING, around)
        self._harness = Program("varm_merge.comparison.harness", harness, around)

    def prepare(self, held_out: HeldOut, pivot: Path, about: Mapping[str, Any], log: Path) -> Path:
        """Render and split held-out data; the folder of the dialogues.

        Raises:
            CommandError: The data, the template or the tokenizer cannot be used.
        """
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        folder = self.folder / f"dialogues-{digest[:12]}"
        if not folder.exists():
            flags = [part for one in held_out.data for part in ("--data", one)]
            flags += ["--pivot", str(pivot), "--dialogues", str(folder), "--max-length", str(_length(pivot))]
            flags += ["--template", held_out.template] if held_out.template else []
            self._trainer.run(["prepare", *flags, *self._trust("--trust-remote-code")], log)
        return folder

    def held_out(self, model: Path, dialogues: Path, log: Path) -> dict[str, Any]:
        """Loss per byte and exact matches by group of conversations, ``all`` first, and the sums of each.

        Raises:
            CommandError: It cannot be scored, or its loss is not finite.
        """
        output = self.folder / "scores.json"
        output.unlink(missing_ok=True)
        where = ["--model", str(model), "--dialogues", str(dialogues), "--output", str(output)]
        self._trainer.run(["evaluate", *where, *self._trust("--trust-remote-code")], log)
        found = json.loads(output.read_text(encoding="utf-8"))
        output.unlink()
        return {"groups": found["groups"], "conversations": found["conversations"]}

    def demand(self, tasks: Tasks, log: Path) -> None:
        """See that the harness knows all tasks.

        Raises:
            CommandError: One it does not know.
        """
        settings, folder = self.folder / "tasks.json", tasks.include_path
        asked = {"tasks": tasks.names, "include_path": str(folder) if folder else None}
        write_whole(settings, json.dumps(asked))
        self._harness.run([str(settings), os.devnull], log)

    def task(self, tasks: Tasks, task: str, model: Path, log: Path) -> dict[str, Any]:
        """What the harness measures of a task (or of a group or tag of tasks).

        Raises:
            CommandError: The harness failed.
            UserError: A number is not finite.
        """
        settings, output = self.folder / "task.json", self.folder / "measures.json"
        output.unlink(missing_ok=True)
        asked = {
            "task": str(Path(task).absolute()) if task.endswith(".yaml") else task,
            "include_path": str(tasks.include_path) if tasks.include_path else None,
            "model_args": {"pretrained": str(model), "trust_remote_code": self.trust_remote_code},
            "num_fewshot": tasks.num_fewshot,
            "limit": tasks.limit,
            "batch_size": tasks.batch_size,
            "apply_chat_template": tasks.chat_template,
            "device": self.device,
        }
        write_whole(settings, json.dumps(asked))
        self._harness.run([str(settings), str(output)], log)
        found = json.loads(output.read_text(encoding="utf-8"))
        output.unlink()
        return {"measures": list(_measures(found))}

    def close(self) -> None:
        """End the programs."""
        self._trainer.close()
        self._harness.close()

    def _trust(self, flag: str) -> Sequence[str]:
        return [flag] if self.trust_remote_code else []


def differences(one: Mapping[str, Any], other: Mapping[str, Any], group: str) -> dict[str, Any]:
    """How much two models' scores on held-out text differ, over the same conversations.

    Args:
        one: What ``Scorers.held_out`` returned.
        other: The same of another model.
        group: Of conversations; ``all``: every one.

    Returns:
        For each score ``[difference, its standard error]``; the error is None with a single conversation.
    """
    names = [
        name
        for name, of in one["conversations"].items()
        if group in ("all", of["group"]) and name in other["conversations"]
    ]
    sides = [[of["conversations"][name] for name in names] for of in (one, other)]
    return {
        score: difference(*(([of[top] for of in own], [of[bottom] for of in own]) for own in sides))
        for score, (top, bottom) in RATIOS.items()
        if all(any(of[bottom] for of in own) for own in sides)
    }


def _length(pivot: Path) -> int:
    """Tokens of a block: the pivot's context, but no more than ``MOST_TOKENS``."""
    try:
        config = json.loads((pivot / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        context = next((int(text[name]) for name in CONTEXT if name in text), MOST_TOKENS)
    except (OSError, ValueError, TypeError, AttributeError):
        context = MOST_TOKENS
    return max(LEAST_TOKENS, min(MOST_TOKENS, context))


def _measures(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each metric of each task: value, standard error (None if there is none), whether higher is better."""
    for task, metrics in {**found["results"], **(found.get("groups") or {})}.items():
        better = found.get("higher_is_better", {}).get(task) or {}
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
                "higher_is_better": bool(better.get(metric, True)),
                "samples": (found.get("n-samples", {}).get(task) or {}).get("effective"),
                "group": task in (found.get("groups") or {}),
            }
