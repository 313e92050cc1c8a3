"""Which files hold a model's weights, which tensors are in them, and their fingerprint. No weight is read.

transformers and mergekit read ``model.safetensors`` or the shards of its index, else ``pytorch_model.bin`` or the
shards of its index. If the two programs would read different files, or an index is damaged or names a missing
file, that is a problem, and no file is chosen silently.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from varm_common import files
from varm_common.errors import some
from varm_common.stored_tensors import is_lfs_pointer, lfs_advice, pickled_tensors

__all__ = [
    "CONVERSION",
    "DTYPES",
    "INDEX",
    "PICKLED",
    "WEIGHT_FILE",
    "WHOLE",
    "Header",
    "Tensors",
    "WeightFiles",
    "choose_weight_files",
    "content_sha256",
    "file_tensors",
    "fingerprint",
    "fingerprint_of",
    "read_header",
    "weight_files",
]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONVERSION = "conversion.json"
"""What ``fusion-trainer convert`` made a folder from."""
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?")
"""Names under which transformers and mergekit save weights."""
DTYPES = {"bfloat16": "BF16", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
DTYPES |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}
DTYPES |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
"""safetensors' names of dtypes by torch's names."""

Tensors = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype (as in safetensors: F32, BF16, …) by name."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one checkpoint."""

    names: list[str]  # the files that transformers loads, in ascending order
    named: Mapping[str, str] | None = None  # the shard of each tensor by the index; None if one file holds all
    problems: list[str] = field(default_factory=list)  # why files cannot be read, or could be the wrong ones
    remarks: list[str] = field(default_factory=list)  # other weight files there, which are not read


def choose_weight_files(names: set[str], read: Callable[[str], str | bytes]) -> WeightFiles:
    """Choose the files that hold a checkpoint's weights.

    Args:
        names: All files of the checkpoint.
        read: Returns the content of a file. It is called for an index only.
    """
    shards = {name for name in names if SHARD.fullmatch(name)}
    for whole, index in ((WHOLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if index in names:
            return _indexed_files(names, shards, whole, index, read)
        if whole in names:
            return WeightFiles([whole], remarks=_not_read(shards, whole))
    if shards:
        return WeightFiles([], problems=[f"there are shards ({some(sorted(shards))}) and no {INDEX}: copy it"])
    return WeightFiles([])


def _indexed_files(
    names: set[str], shards: set[str], whole: str, index: str, read: Callable[[str], str | bytes]
) -> WeightFiles:
    try:
        text = content if isinstance(content := read(index), str) else content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark, which mergekit does not read")
        named = {str(tensor): str(shard) for tensor, shard in json.loads(text)["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return WeightFiles([], problems=[f"`{index}` is damaged ({error!r}): copy it again"])
    listed = sorted(set(named.values()))
    if whole in names and listed != [whole]:
        problem = (
            f"both `{whole}` and `{index}` are there: transformers reads the first, mergekit the shards of the "
            "second. Remove the one that is out of date"
        )
        return WeightFiles([whole], problems=[problem])
    problems = []
    if outside := [name for name in listed if "/" in name or "\\" in name]:
        problems.append(f"`{index}` names files outside the folder: {some(outside)}")
    elif missing := [name for name in listed if name not in names]:
        problems.append(f"`{index}` names {some(missing)}, and that file is not there: copy it, or save again")
    elif not listed:
        problems.append(f"`{index}` names no tensor: copy it again")
    return WeightFiles(listed, named, problems, _not_read(shards - {*listed}, index))


def _not_read(shards: set[str], read: str) -> list[str]:
    return [f"{some(sorted(shards))}: not read, beside `{read}`"] if shards else []


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a local checkpoint."""
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    chosen = choose_weight_files(names, lambda name: (folder / name).read_bytes())
    if not chosen.names:
        return chosen
    other = files.json_entry(folder / "config.json", "transformers_weights")
    if other and [other] != chosen.names:
        chosen.problems.append(
            f"transformers reads `{other}` (`transformers_weights` in config.json), mergekit "
            f"{some(chosen.names)}: remove that entry, or give the file the name that mergekit reads"
        )
    if "adapter_config.json" in names:
        base = files.json_entry(folder / "adapter_config.json", "base_model_name_or_path")
        chosen.problems.append(
            f"an adapter is in the same folder as {some(chosen.names)}: transformers loads it on `{base}`, "
            "mergekit loads the weights without it. Keep the adapter in its own folder; to merge with it, name "
            "`model+adapter`"
        )
    return chosen


@dataclass(frozen=True)
class Header:
    """The tensors in the weight files of a local checkpoint. Problems and remarks are sentences."""

    tensors: Tensors = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # the file of each tensor
    problems: list[str] = field(default_factory=list)  # what is wrong with the files
    remarks: list[str] = field(default_factory=list)  # other weight files there, which are not read


def read_header(folder: Path) -> Header:
    """The tensors of a local checkpoint. A pickle is read without running its code."""
    chosen = weight_files(folder)
    header = Header(problems=[*chosen.problems], remarks=[*chosen.remarks])
    shared: dict[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str]] = {}
    for name in chosen.names:
        file = folder / name
        if not file.is_file():
            continue  # a problem already
        try:
            tensors = dict(file_tensors(file))
        except ValueError as error:
            header.problems.append(str(error))
            continue
        if chosen.named is not None:
            header.problems.extend(_disagreements(name, chosen.named, tensors))
        for tensor, described in tensors.items():  # names and shapes repeat: one object for each saves memory
            header.tensors[sys.intern(tensor)] = shared.setdefault(described, described)
            header.files[sys.intern(tensor)] = file
    return header


def _disagreements(shard: str, named: Mapping[str, str], tensors: Tensors) -> Iterator[str]:
    """Differences between index and header of a shard: transformers reads by the header, mergekit by the index."""
    if lacks := [name for name, where in named.items() if where == shard and name not in tensors]:
        yield f"`{shard}` lacks {some(lacks)}, which the index puts there: copy it again"
    if foreign := [name for name in tensors if named.get(name) != shard]:
        yield f"`{shard}` has {some(foreign)}, which the index does not put there: save the model again"


def file_tensors(path: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Name, shape and dtype of each tensor of one weight file.

    Raises:
        ValueError: It cannot be read.
    """
    if path.suffix != ".safetensors":
        for name, tensor in pickled_tensors(path, "meta").items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield name, (tuple(tensor.shape), DTYPES.get(dtype, str(tensor.dtype)))
        return
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                part = file.get_slice(name)
                yield name, (tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(path):
            raise ValueError(lfs_advice(path)) from error
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"`{path.name}` is cut off or damaged ({size}; {error}): copy it again") from error


def fingerprint(folder: Path) -> str:
    """SHA-256 over the JSON list of [name, SHA-256 of the content] of the weight files; empty without any.

    A conversion of a model to safetensors has the fingerprint of the original, as long as its files are unchanged.

    Raises:
        ValueError: The weight files have problems.
    """
    chosen = weight_files(folder)
    if chosen.problems:
        raise ValueError(f"`{folder}`: {'; '.join(chosen.problems)}")
    with ThreadPoolExecutor(4) as threads:
        sums = threads.map(content_sha256, [folder / name for name in chosen.names])
        return fingerprint_of(list(zip(chosen.names, sums, strict=True)), folder / CONVERSION)


def fingerprint_of(sums: Sequence[tuple[str, str]], conversion: Path | None = None) -> str:
    """The fingerprint of weight files by their [name, SHA-256], in ascending order of the names.

    Args:
        sums: All of the weight files.
        conversion: The record beside them, if they are a conversion.
    """
    if sums and conversion and files.json_entry(conversion, "files") == dict(sums):
        return str(files.json_entry(conversion, "weights"))
    return files.fingerprint([list(pair) for pair in sums]) if sums else ""


def content_sha256(path: Path) -> str:
    """SHA-256 of a file. In the Hub's cache it is the name of the blob, and nothing is read."""
    blob = path.resolve().name
    return blob if path.is_symlink() and len(blob) == 64 else files.sha256_of(path)
