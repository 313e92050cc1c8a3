"""Whether a model that a recipe names is there: as a folder, in the Hub's cache, or on the Hub."""

import difflib
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["near", "why_missing"]

HUB_TIMEOUT_SECONDS = 10


def why_missing(path: str, revision: str | None, wanted: str, cache_dir: str | None) -> str | None:
    """Why mergekit could not load the folder or Hub id ``path``, whose ``wanted`` file says what it is."""
    folder = Path(path)
    if folder.is_dir():
        return None if (folder / wanted).is_file() else f"the folder `{path}` has no {wanted}"
    missing = f"no {'adapter' if wanted.startswith('adapter') else 'model'} folder `{path}`{near(path)}"
    try:
        huggingface_hub.utils.validate_repo_id(path)  # type: ignore[attr-defined]
    except HFValidationError:
        return missing
    if isinstance(
        huggingface_hub.try_to_load_from_cache(path, wanted, cache_dir=cache_dir, revision=revision), str
    ):
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"{missing}, and it is not in the Hub cache (HF_HUB_OFFLINE is set)"
    try:
        api = huggingface_hub.HfApi()
        info = api.model_info(path, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(path)  # all may read about it, and not all its files
        if info.siblings is not None and all(file.rfilename != wanted for file in info.siblings):
            return f"`{path}` on the Hub has no {wanted}"
    except GatedRepoError:
        return f"`{path}` is gated: accept its conditions on the Hub, then run `hf auth login`"
    except RevisionNotFoundError:
        return f"`{path}` has no revision `{revision}` on the Hub"
    except RepositoryNotFoundError:
        return f"{missing}, and no such model on the Hub (if it is private, run `hf auth login`)"
    except Exception as error:  # whatever the HTTP client raises without a network
        return f"{missing}, and the Hub could not be asked ({type(error).__name__})"
    return None


def near(path: str) -> str:
    """A hint at what is there, where the last part of a path seems misspelt."""
    parent = Path(path).parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, siblings, n=1)
    return f" (did you mean `{parent / close[0]}`?)" if close else ""
