"""Arrays in a safetensors file, with a description of what they were computed from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from varm_common.errors import UserError, demand_same
from varm_common.files import atomic_file, fingerprint, remove_abandoned, written_to

__all__ = ["damage", "load_arrays", "path_of", "save_arrays"]

KEY = "fusion_trainer"
Arrays = dict[str, NDArray[Any]]


def path_of(folder: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """The file in ``folder`` for the arrays of this identity."""
    return folder / f"{name}-{fingerprint(dict(identity))[:12]}.safetensors"


def save_arrays(path: Path, kind: str, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write ``arrays``; the file appears only when it is complete.

    Args:
        path: The file.
        kind: The name of its format.
        described: What is stored with the arrays; what they were computed from is under ``identity``.
        arrays: By name.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    head = {KEY: json.dumps({"format": kind, "sha256": _sha256(arrays), **described})}
    with written_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        with atomic_file(path) as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, head))


def load_arrays(path: Path, kind: str, identity: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Arrays]:
    """The description and the arrays that ``save_arrays`` has written.

    Raises:
        UserError: The file has another format, is damaged, or has another identity than the one given.
    """
    try:
        with safe_open(path, "numpy") as file:
            described = json.loads((file.metadata() or {})[KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored_kind, sha256 = str(described["format"]), str(described["sha256"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"`{path}` is not a {kind}: {error or type(error).__name__}") from error
    if stored_kind != kind:
        raise UserError(f"`{path}` is not a {kind} but a {stored_kind}")
    if sha256 != _sha256(arrays):
        raise UserError(
            f"`{path}` is damaged: its content has changed since it was written. Remove it, and it will "
            "be written again"
        )
    if identity is not None:
        title = f"`{path}` is a {kind} that was made from other inputs:"
        demand_same(title, identity, described["identity"], "Remove that file.")
    return described, arrays


def damage(path: Path) -> str | None:
    """The problem of a file of ``save_arrays``; None if it has none, or if another program wrote it."""
    try:
        with safe_open(path, "numpy") as file:
            described = (file.metadata() or {}).get(KEY)
        if described is not None:
            load_arrays(path, json.loads(described)["format"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return str(error) if isinstance(error, UserError) else f"`{path}` cannot be read: {error}"
    return None


def _sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
