"""Whether a stage is up to date, and if not, why it has to run.

A finished stage has a record in its folder, ``stage.json``: the fingerprint of everything its result depends on
(settings, models and data by content, earlier stages), and the SHA-256 of the files it wrote. A stage that has
begun has such a record beside its folder, without files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_trainer.pipeline.checksums import Checksums, read_object
from fusion_trainer.pipeline.stage import BEGUN, KINDS, RECORD, Stage
from varm_common.files import TEMPORARY, fingerprint

__all__ = ["State", "begun_path", "files_written", "record_of", "state_of"]

RULES = 2
"""To be raised when results of earlier versions must not be used any more."""


@dataclass(frozen=True)
class State:
    """The state of a stage.

    Attributes:
        stage: The stage.
        depends: Everything its result depends on.
        fingerprint: Of ``depends``.
        reason: The state in words.
        made: Whether the result is up to date.
        resumes: Whether the folder holds the beginning of exactly this result.
        foreign: A file in the folder that no stage has written.
    """

    stage: Stage
    depends: dict[str, Any]
    fingerprint: str
    reason: str
    made: bool = False
    resumes: bool = False
    foreign: Path | None = None


def state_of(stage: Stage, depends: dict[str, Any], checksums: Checksums) -> State:
    """Compare what a stage depends on now with the records of what it depended on before."""
    mark = fingerprint([RULES, stage.kind, depends])
    record, started = record_of(stage), read_object(begun_path(stage))
    if record.get("fingerprint") == mark:
        changed = checksums.changed(stage.output, record["files"])
        if changed is None:
            return State(stage, depends, mark, "up to date", made=True)
        reason = f"runs again: `{stage.output / changed}` was changed or removed"
    elif started.get("fingerprint") == mark:
        reason = "resumes"
        if stage.kind != "merge":  # mergekit starts from the beginning
            return State(stage, depends, mark, reason, resumes=True)
    elif before := record or started:
        reason = f"runs again: {_difference(before.get('depends', {}), depends)}"
    else:
        reason = "not run yet"
    return State(stage, depends, mark, reason, foreign=_foreign(stage, record, started))


def record_of(stage: Stage) -> dict[str, Any]:
    """The record of a finished stage; empty if there is none, or it is another stage's."""
    record = read_object(stage.output / RECORD)
    return record if record.get("stage") == stage.title and isinstance(record.get("files"), dict) else {}


def begun_path(stage: Stage) -> Path:
    """Where the record of a stage that has begun is; its folder may not exist yet."""
    return stage.output.with_name(f".{stage.output.name}.{BEGUN}.json")


def files_written(stage: Stage) -> list[Path]:
    """The files of a stage's result, relative to its folder."""
    names = (name for name in _names(stage.output) if _matches(name, KINDS[stage.kind].writes))
    return [name for name in names if name != Path(RECORD)]


def _foreign(stage: Stage, record: Mapping[str, Any], started: Mapping[str, Any]) -> Path | None:
    """A file in the folder of a stage that the stage has not written."""
    if not stage.output.is_dir():
        return stage.output if stage.output.exists() else None
    kind, names = KINDS[stage.kind], _names(stage.output)
    own: tuple[str, ...] = ()
    if record:
        own = (RECORD, *kind.later)
    elif started and any(_matches(name, kind.first) for name in names):
        own = (RECORD, BEGUN, *kind.writes)
    for name in names:
        is_own = name.as_posix() in record.get("files", {}) or _matches(name, own)
        if not is_own and not ((record or started) and _is_temporary(name, kind.temporary)):
            return stage.output / name
    return None


def _names(folder: Path) -> list[Path]:
    """All files below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())


def _matches(name: Path, patterns: Sequence[str]) -> bool:
    return any(len(name.parts) == len(Path(pattern).parts) and name.match(pattern) for pattern in patterns)


def _is_temporary(name: Path, folders: str) -> bool:
    in_folder = len(name.parts) > 1 and re.fullmatch(folders, name.parts[0])
    return bool(in_folder) or any(part.endswith(TEMPORARY) for part in name.parts)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings, inputs and stages have changed, in words."""
    changes = []
    for part in ("settings", "inputs", "stages"):
        old, new = _flat(before.get(part, {})), _flat(now[part])
        for key in sorted({**old, **new}):
            if old.get(key) == new.get(key):
                continue
            if part == "settings":
                values = [json.dumps(side.get(key), ensure_ascii=False) for side in (old, new)]
                changes.append(f"{key} {' → '.join(values)}")
            else:
                how = "is new" if key not in old else "is gone" if key not in new else "has changed"
                changes.append(f"{key} {how}")
    more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
    return "; ".join(changes[:4]) + more or "this version computes this stage differently"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
