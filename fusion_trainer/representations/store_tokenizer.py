"""The tokenizer a store was made with."""

from fusion_trainer.representations.store import RepresentationStore
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
    """Where a store's tokenizer is: name and revision. ``moved_to`` replaces what the manifest says."""
    if moved_to:
        return moved_to, None
    name, revision = ("pivot", "pivot_revision") if store.aligned else ("model", "revision")
    return store.identity[name], store.identity[revision]


def tokenizer_of(store: RepresentationStore, moved_to: str | None, code: bool) -> TextTokenizer:
    """A store's tokenizer.

    Raises:
        UserError: There is none, or it is not the one the store was made with.
    """
    tokenizer = tokenizer_at(*place_of(store, moved_to), code)
    store.demand(tokenizer=tokenizer.sha256)
    return tokenizer
