"""Arrays on the disk with a description of what they are of: safetensors, whole or not at all, nothing pickled."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from varm_common.errors import UserError, unlike
from varm_common.files import fingerprint, remove_abandoned, whole_file, written_to

__all__ = ["damage", "keep", "kept", "kept_of", "place"]

KEY = "fusion_trainer"
Arrays = dict[str, NDArray[Any]]


def place(folder: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """Where in ``folder`` the arrays of this identity are kept."""
    return folder / f"{name}-{fingerprint(dict(identity))[:12]}.safetensors"


def keep(path: Path, what: str, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write ``arrays``; ``what`` names their format, ``described`` holds what they are of under ``identity``.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    head = {KEY: json.dumps({"format": what, "sha256": _sha256(arrays), **described})}
    with written_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        with whole_file(path) as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, head))


def kept(path: Path, what: str) -> tuple[dict[str, Any], Arrays]:
    """What ``keep`` has written there: the description and the arrays.

    Raises:
        UserError: It is nothing of this format.
    """
    try:
        with safe_open(path, "numpy") as file:
            described = json.loads((file.metadata() or {})[KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = str(described["format"]), str(described["sha256"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"`{path}` is not a {what}: {error or type(error).__name__}") from error
    if found[0] != what:
        raise UserError(f"`{path}` is not a {what} but a {found[0]}")
    if found[1] != _sha256(arrays):
        raise UserError(
            f"`{path}` is damaged: its bytes are not those that were written. Remove it; it is made again"
        )
    return described, arrays


def damage(path: Path) -> str | None:
    """What is wrong with a file of ``keep``; None if nothing is, or if it is another's file."""
    try:
        with safe_open(path, "numpy") as file:
            own = KEY in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        return f"`{path}` cannot be read: {error}"
    if not own:
        return None
    try:
        with safe_open(path, "numpy") as file:
            kept(path, json.loads(file.metadata()[KEY])["format"])
    except (UserError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def kept_of(path: Path, what: str, identity: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """The same, of this identity.

    Raises:
        UserError: It is nothing of this format, or of another identity.
    """
    described, arrays = kept(path, what)
    if difference := unlike(f"`{path}` is a {what} of something else:", dict(identity), described["identity"]):
        raise UserError(f"{difference}\nRemove that file.")
    return described, arrays
