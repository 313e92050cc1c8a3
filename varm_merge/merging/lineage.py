"""Whether the targets of a recipe were fine-tuned from its base model, as far as they record it.

A target made by ``fusion-trainer train`` has a ``fusion.json`` with the fingerprint of its pivot's weights: the
SHA-256 of the JSON list of [file name, SHA-256 of its content] of the weight files, ascending by name. A
conversion of a pickled model to safetensors has the fingerprint of the original. The files of a Hub model are
known by hash without being read.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from varm_common import checkpoints
from varm_common.checkpoints import CONVERSION, WeightFiles, fingerprint, fingerprint_of

__all__ = ["FUSION", "Place", "base_models_named", "files_on_the_hub", "foreign_targets", "weights_fingerprint"]

FUSION = "fusion.json"


@dataclass(frozen=True)
class Place:
    """A model folder, or a Hub id with its revision."""

    path: str
    revision: str | None = None
    cache_dir: str | None = None

    def folder(self) -> Path | None:
        """Its folder, or for a Hub id its snapshot in the cache; None if it has none."""
        if Path(self.path).is_dir():
            return Path(self.path)
        with suppress(OSError):  # it is not in the cache
            snapshot = huggingface_hub.snapshot_download(
                self.path, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
            )
            return Path(snapshot)
        return None

    def file(self, name: str) -> Path | None:
        """One of its files, downloaded if need be; None if it has none of this name, or the Hub is not reached.

        Raises:
            OSError: The Hub refuses it.
        """
        if Path(self.path).is_dir():
            local = Path(self.path) / name
            return local if local.is_file() else None
        try:
            return Path(
                huggingface_hub.hf_hub_download(self.path, name, revision=self.revision, cache_dir=self.cache_dir)
            )
        except LocalEntryNotFoundError as error:
            answer: BaseException | None = error.__cause__
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            answer = error
        if isinstance(answer, HfHubHTTPError):
            raise OSError(" ".join(str(answer).split("\n\n")[0].split())) from answer
        return None

    def weights(self) -> list[Path]:
        """Its weight files, if all of them are here."""
        folder = self.folder()
        chosen = checkpoints.weight_files(folder) if folder else WeightFiles([])
        return [] if folder is None or chosen.problems else [folder / name for name in chosen.names]


def foreign_targets(pivot: Place, targets: Sequence[Place]) -> Iterator[tuple[int, str]]:
    """Targets that were fine-tuned from another pivot: their number, and the name of that pivot.

    Raises:
        ValueError: A ``fusion.json`` has no pivot.
    """
    own_weights: str | None = None
    for number, target in enumerate(targets):
        if (path := target.file(FUSION)) is None:
            continue
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))["pivot"]
            model, weights = str(recorded["model"]), str(recorded["weights"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{path}` does not name a pivot: {error}") from error
        own_weights = own_weights or weights_fingerprint(pivot)
        if own_weights != weights:
            yield number, model


def base_models_named(place: Place) -> list[str]:
    """The base models that a model's card names in its metadata; empty if it names none that can be read."""
    try:
        path = place.file("README.md")
        metadata = huggingface_hub.metadata_load(path) if path else None
    except (ValueError, OSError, yaml.YAMLError):
        return []
    named = (metadata or {}).get("base_model") or []
    return [str(model) for model in (named if isinstance(named, list) else [named])]


def weights_fingerprint(place: Place) -> str:
    """The fingerprint of a model's weight files; empty if it has none.

    Raises:
        ValueError: It is not certain which files those are.
    """
    if Path(place.path).is_dir():
        return fingerprint(Path(place.path))
    with suppress(OSError, ValueError):  # parts of it are not in the cache
        if (folder := place.folder()) is not None and (known := fingerprint(folder)):
            return known
    info = huggingface_hub.HfApi().model_info(place.path, revision=place.revision, files_metadata=True)
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    names = {file.rfilename for file in info.siblings or []}
    chosen = files_on_the_hub(place, names)
    conversion = place.file(CONVERSION) if CONVERSION in names else None
    return fingerprint_of([(name, hashes[name]) for name in chosen.names if name in hashes], conversion)


def files_on_the_hub(place: Place, names: set[str]) -> WeightFiles:
    """The weight files of a model on the Hub that has the files ``names``; an index is downloaded."""

    def read(name: str) -> bytes:
        if (path := place.file(name)) is None:
            raise OSError(f"`{name}` cannot be downloaded")
        return path.read_bytes()

    return checkpoints.choose_weight_files({name for name in names if "/" not in name}, read)
