"""The models that recipes name: their folders, and whether their files have changed."""

from pathlib import Path

from mergekit.common import ModelReference

from varm_common.checkpoints import weight_files
from varm_common.errors import UserError
from varm_merge.comparison.cache import model_files, state_of
from varm_merge.comparison.recipes import Entry
from varm_merge.merging.lineage import Place

__all__ = ["model_folder", "model_state", "states"]


def model_folder(model: str, cache_dir: str | None) -> Path:
    """The folder of a model; from the Hub it is downloaded.

    Raises:
        UserError: It has an adapter, has no weights, or cannot be downloaded.
    """
    reference = ModelReference.model_validate(model)
    if reference.lora is not None:
        raise UserError(f"{model} is a model with an adapter; it is merged, but not measured by itself")
    place = Place(reference.model.path, reference.model.revision, cache_dir)
    folder = place.folder()
    files = weight_files(folder) if folder is not None else None
    if folder and files and files.names and (folder == Path(place.path) or not files.problems):
        return folder  # of a snapshot with problems, some files are not downloaded yet
    if folder is not None and folder == Path(place.path):
        raise UserError(f"the folder `{folder}` has no weights")
    try:
        return Path(reference.local_path(cache_dir))
    except Exception as error:  # whatever the HTTP client raises
        raise UserError(f"`{model}` cannot be downloaded: {error}") from error


def states(entry: Entry, cache_dir: str | None) -> dict[str, str]:
    """The state of every model that a recipe reads; one of which only the tokenizer is used is not downloaded."""
    known = {model: model_state(model, cache_dir) for model in entry.models}
    for model in entry.tokenizers:
        folder = Path(ModelReference.model_validate(model).model.path)
        known[model] = state_of(model_files(folder)) if folder.is_dir() else model
    return known


def model_state(model: str, cache_dir: str | None) -> str:
    """The fingerprint of a model's files; for an adapter also of those of the model under it.

    Raises:
        UserError: The model cannot be read or downloaded.
    """
    reference = ModelReference.model_validate(model)
    folders = [model_folder(str(ModelReference(model=reference.model)), cache_dir)]
    if reference.lora and (adapter := Path(reference.lora.path)).is_dir():
        folders.append(adapter)
    return state_of(file for folder in folders for file in model_files(folder))
