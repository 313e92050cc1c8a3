"""Checks a store and the files beside it."""

from collections.abc import Iterator

from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.training.batches import DIGITS
from varm_common.errors import UserError
from varm_common.files import sha256_of
from varm_common.saved_arrays import damage

__all__ = ["all_problems"]


def all_problems(store: RepresentationStore) -> Iterator[str]:
    """Everything wrong with a store, its dialogues, their token files, and the maps and counts beside it."""
    yield from store.problems()
    if (dialogues := Dialogues.beside(store.folder, store.identity["data"])) is not None:
        try:
            len(dialogues)
        except UserError as error:
            yield str(error)
        for path in sorted(dialogues.folder.glob("tokens-*-*.arrow")):
            if not sha256_of(path).startswith(path.stem.rpartition("-")[2][:DIGITS]):
                yield f"{path}: its content has changed since it was written; remove it, and it is written again"
    folder = store.folder.resolve().parent
    arrays = sorted((*folder.glob("*.safetensors"), *folder.parent.glob("maps/*.safetensors")))
    yield from filter(None, map(damage, arrays))
