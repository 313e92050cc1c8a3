"""The tokenizer a store was made with."""

from fusion_trainer.representations.store import ALIGNED, RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from varm_common.models import local_folder

__all__ = ["place_of", "tokenizer_at", "tokenizer_of"]


def tokenizer_at(name: str, revision: str | None, code: bool) -> TextTokenizer:
    """The tokenizer of a folder or Hub id.

    Raises:
        UserError: There is none.
    """
    return load_tokenizer(local_folder(name, revision, weights=False, code=code)[0], name, code)


def place_of(store: RepresentationStore, moved_to: str | None) -> tuple[str, str | None]:
    """Where a store's tokenizer is: name and revision, as its manifest says or as the user does."""
    if moved_to:
        return moved_to, None
    side = ("pivot", "pivot_revision") if store.identity.get("kind") == ALIGNED else ("model", "revision")
    name, revision = (store.identity[key] for key in side)
    return name, revision


def tokenizer_of(store: RepresentationStore, moved_to: str | None, code: bool) -> TextTokenizer:
    """A store's tokenizer.

    Raises:
        UserError: There is none, or it is not the one the store was made with.
    """
    reader = tokenizer_at(*place_of(store, moved_to), code)
    store.demand(tokenizer=reader.sha256)
    return reader
