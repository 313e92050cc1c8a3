"""Tensors as weight files hold them: safetensors, or pickles (``.bin``), of which no code is ever run."""

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from varm_common.errors import some

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_lfs_pointer", "lfs_advice", "pickled_tensors", "stored_tensor"]

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for one that Git LFS has not downloaded."""


def pickled_tensors(path: Path, device: str = "cpu") -> "dict[str, Tensor]":
    """The tensors of a pickle, by name. Only tensors and plain containers are unpickled, so no code is run.

    The file is mapped, so no more of it is read than is used; files of torch before 1.6 cannot be mapped.

    Args:
        path: The file.
        device: ``cpu``, or ``meta`` for tensors without their values.

    Raises:
        ValueError: It would run code, is damaged, or is not a flat mapping of names to dense tensors.
    """
    import torch

    if is_lfs_pointer(path):
        raise ValueError(lfs_advice(path))
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True, mmap=is_zipfile(path) or None)
    except Exception as error:  # torch raises errors of all kinds at a damaged file
        raise ValueError(f"`{path.name}` {_why(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        nested = ": they lie under `state_dict`" if isinstance(content, dict) and "state_dict" in content else ""
        raise ValueError(
            f"`{path.name}` is not a flat mapping of names to tensors{nested}. "
            "Load it with torch.load(weights_only=True) and save its tensors as safetensors"
        )
    if sparse := [name for name, value in content.items() if value.layout != torch.strided]:
        raise ValueError(f"`{path.name}` has sparse tensors: {some(sparse)}. Save them dense, by .to_dense()")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is not there but for its pointer of Git LFS."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_advice(path: Path) -> str:
    """What to do about a pointer of Git LFS."""
    return f"`{path.name}` is a pointer of Git LFS, not the file: run `git lfs pull` in its folder"


def _why(error: Exception) -> str:
    """Why a pickle is not read, without torch's advice to load it all the same."""
    text = str(error).strip() or type(error).__name__
    if code := re.search(r"GLOBAL (\S+)", text):
        return (
            f"cannot be read without running code of its own (`{code[1]}`), and no such code is run. Use a "
            "revision of the model that has safetensors"
        )
    reason = (text.rpartition("WeightsUnpickler error:")[2].strip() or text).splitlines()[0]
    return (
        f"cannot be read without running code of its own, or is damaged ({reason}): copy it again, or save the "
        "model as safetensors"
    )


def stored_tensor(path: Path, name: str, rows: int | None = None) -> "Tensor":
    """A tensor of a weight file, or its first ``rows`` rows.

    Raises:
        ValueError: The file is a pickle that cannot be read safely.
    """
    if path.suffix != ".safetensors":
        tensor = _mapped(path, path.stat().st_mtime_ns)[name]
        return tensor if rows is None else tensor[:rows]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        part: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
    return part


@lru_cache(maxsize=2)
def _mapped(path: Path, changed_ns: int) -> "dict[str, Tensor]":
    """The tensors of a pickle, kept mapped: to find one of them, all names have to be unpickled."""
    return pickled_tensors(path)
