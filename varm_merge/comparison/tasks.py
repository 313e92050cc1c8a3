"""The tasks of lm-evaluation-harness that a comparison runs, and everything that their scores depend on."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError
from varm_common.versions import installed
from varm_merge.comparison.backends import NEEDS, SERVERS, TRANSFORMERS
from varm_merge.comparison.cache import state_of
from varm_merge.comparison.servers import Servers
from varm_merge.comparison.suites import Task

__all__ = ["Tasks"]

HARNESS = "lm-eval"
OURS = ("pretrained", "model", "base_url", "tokenizer", "trust_remote_code", "device", "batch_size")
"""Arguments of the harness's models that other options set."""
DATA_KEYS = ("dataset_path", "data_dir", "data_files")
"""Keys of a task file that may name local data."""


@dataclass(frozen=True)
class Tasks:
    """The tasks, and the settings of the harness for all of them.

    Attributes:
        tasks: The tasks, each with its own settings.
        include_path: Folder with task files of the user.
        limit: Maximum number of questions, or a share of them if below 1.
        batch_size: A number or ``auto``; for a server the number of requests at a time.
        backend: One of `backends.BACKENDS`.
        model_args: More arguments of the harness's model class: ``dtype=bfloat16,max_length=4096``.
        allow_code: Whether tasks may run the code that models write.
        servers: The servers of the models, for the backends that use one.
    """

    tasks: tuple[Task, ...]
    include_path: Path | None = None
    limit: float | None = None
    batch_size: str = "auto"
    backend: str = TRANSFORMERS
    model_args: str = ""
    allow_code: bool = False
    servers: Servers = field(default_factory=Servers)

    @property
    def served(self) -> bool:
        """Whether servers run the models."""
        return self.backend in SERVERS

    def demand(self) -> None:
        """Check that the harness and the backend are installed, and that the options fit together.

        Raises:
            UserError: They are not, or do not.
        """
        modules, package = NEEDS[self.backend]
        if missing := [name for name in modules if find_spec(name) is None]:
            backend = "" if self.backend == TRANSFORMERS else f" --backend {self.backend}"
            some = "lm-evaluation-harness" if "lm_eval" in missing else ", ".join(missing)
            raise UserError(f"--tasks{backend} needs {some}: pip install {package}")
        names = [part.partition("=")[0].strip() for part in self.model_args.split(",") if part.strip()]
        if taken := [name for name in names if name in OURS]:
            raise UserError(f"--model-args: `{taken[0]}` is set by varm-merge itself")
        if self.served != bool(self.servers.urls):
            given = f"--backend {self.backend}" if self.served else "--server-url"
            needed = "--server-url" if self.served else f"--backend {' or '.join(SERVERS)}"
            raise UserError(f"{given} needs {needed}")

    def inputs(self, task: Task) -> dict[str, Any]:
        """Everything that the scores of a task depend on, besides the model: settings, files, and the harness."""
        settings = {name: getattr(self, name) for name in ("limit", "batch_size", "backend", "model_args")}
        settings |= {name: value for name, value in asdict(task).items() if name not in ("name", "metric")}
        own_folder = Path(task.name).parent if task.name.endswith(".yaml") else None
        folders = [folder for folder in (self.include_path, own_folder) if folder]
        files = {file.resolve() for folder in folders for file in folder.rglob("*") if _counts(file)}
        for file in [file for file in files if file.suffix in (".yaml", ".yml")]:
            files |= {named.resolve() for named in _named_files(file)}
        local = state_of(files) if files else None
        return {"task": task.name, "local": local, "settings": settings, HARNESS: installed(HARNESS)}

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process that runs a task. A server gets only the key that the user named."""
        variables = dict(inherited)
        if self.allow_code:
            variables["HF_ALLOW_CODE_EVAL"] = "1"
        if self.served:
            variables["OPENAI_API_KEY"] = self.servers.key()
        return variables


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
