"""Convert a model with pickled weights (``.bin``) to safetensors.

Every tensor keeps its name, shape, dtype and bits. Names that share one tensor each get their own copy, because
only the model's config says which weights are tied. ``conversion.json`` records what the files were made from, and
gives them the original's fingerprint (``checkpoints.fingerprint``): stores and targets of the one are valid for
the other.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varm_common import files
from varm_common.checkpoints import CONVERSION, INDEX, WEIGHT_FILE, Header, read_header
from varm_common.console import is_quiet
from varm_common.errors import UserError, some
from varm_common.models import TOKENIZER_FILES, config_fingerprint, local_folder, weight_files, weights_fingerprint
from varm_common.record import Record
from varm_common.stored_tensors import stored_tensor

__all__ = ["convert"]

FORMAT, VERSION = "safetensors conversion", 1
SHARD_BYTES = 5_000_000_000
REMEDY = "Give another OUT, or remove that folder"


def convert(model: str, output: Path, revision: str | None = None, shard_bytes: int = SHARD_BYTES) -> bool:
    """Write a copy of a model whose weights are safetensors. Code of the model is copied, and not run.

    Args:
        model: A folder or Hub id.
        output: The folder to write. It appears when it is complete; an interrupted conversion resumes.
        revision: Branch, tag or commit on the Hub.
        shard_bytes: Size of a weight file.

    Returns:
        Whether anything was written; false if the conversion is there already.

    Raises:
        UserError: The weights are safetensors already, or cannot be read safely, or ``output`` holds something
            else.
    """
    folder, commit = local_folder(model, revision, code=True)
    if safe := [file.name for file in weight_files(folder, model) if file.suffix == ".safetensors"]:
        raise UserError(f"the weights of `{model}` are safetensors already (`{safe[0]}`): use them as they are")
    identity = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "revision": commit,
        "weights": weights_fingerprint(folder, model),
        "config": config_fingerprint(folder, code=True),
        "shard_bytes": shard_bytes,
    }
    output = output.resolve()
    if _is_there(output, identity):
        return False
    if output.is_mount() or output == Path.cwd():
        kind = "a mount point" if output.is_mount() else "the current folder"
        raise UserError(f"`{output}` is {kind}, which cannot be replaced: give a folder in it as OUT")
    making = output.with_name(f"{output.name}.converting{files.TEMPORARY}")
    lock = output.with_name(f"{output.name}.lock{files.TEMPORARY}")
    with files.written_to(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(lock, f"another process is writing `{output}`"):
            _begin(making, identity)
            _write_weights(folder, making, shard_bytes)
            for path in _small_files(folder):
                shutil.copyfile(path, making / path.name)
            sums = {path.name: files.sha256_of(path) for path in sorted(making.glob("*.safetensors"))}
            files.write_json(making / CONVERSION, {**identity, "files": sums})
            files.sync_tree(making)
            if output.is_dir():
                output.rmdir()  # it is empty
            making.rename(output)
            files.sync_folder(output.parent)
            lock.unlink(missing_ok=True)
    return True


def _is_there(output: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this conversion.

    Raises:
        UserError: It holds something else.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"`{output}` is a file; OUT names a folder")
    record = Record(output / CONVERSION, identity, REMEDY, _decisive).read()
    content = sorted(path.name for path in output.iterdir())
    if record is None and content:
        raise UserError(f"`{output}` holds other files ({some(content)}).\n{REMEDY}.")
    if record is not None and (missing := sorted(set(record["files"]) - {*content})):
        raise UserError(f"`{output}` lacks {some(missing)}.\n{REMEDY}.")
    return record is not None


def _decisive(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that decides what is loaded: a model may have moved, and shards may be larger."""
    return {name: identity[name] for name in ("version", "weights", "config")}


def _begin(making: Path, identity: dict[str, Any]) -> None:
    """The folder in which the conversion is written, with the shards that an interrupted run has finished."""
    record = making / CONVERSION
    begun = files.read_mapping(record) if record.is_file() else {}
    if making.is_dir() and {name: begun.get(name) for name in identity} != identity:
        shutil.rmtree(making)
    making.mkdir(exist_ok=True)
    files.remove_abandoned(making)
    files.write_json(record, identity)


def _write_weights(folder: Path, making: Path, shard_bytes: int) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from tqdm import tqdm

    header = read_header(folder)
    if header.problems:
        raise UserError(f"the weights in `{folder}`: {'; '.join(header.problems)}")
    # without their values, so that of tensors that share their storage each counts with its own size
    outlines = {
        name: torch.empty_like(stored_tensor(file, name), device="meta") for name, file in header.files.items()
    }
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=shard_bytes)
    shards = split.filename_to_tensors.items()
    for shard, names in tqdm(shards, unit="file", desc="safetensors", disable=is_quiet()):
        if not (making / shard).is_file():
            _write_shard(header, names, making / shard)
    if split.is_sharded:
        files.write_json(making / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_shard(header: Header, names: list[str], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, storages = {}, set()
    for name in names:
        tensor = stored_tensor(header.files[name], name).contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    temporary = files.temporary_name(path)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        files.sync_folder(temporary)
        temporary.replace(path)
    except (SafetensorError, ValueError, KeyError) as error:  # a full disk, or a dtype that safetensors lacks
        raise UserError(f"`{path}` cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer, generation config, templates and code."""
    paths = {path for pattern in (*TOKENIZER_FILES, "*.py") for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not WEIGHT_FILE.fullmatch(path.name) and path.name != CONVERSION)
