"""Whether a model that a recipe names is there: as a folder, in the Hub's cache, or on the Hub."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["Hub", "means_otherwise", "near"]

HUB_TIMEOUT_SECONDS = 10
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
ALONE = "`varm-merge check --offline` looks at the recipe alone"


@dataclass
class Hub:
    """The Hub, which is not asked again once it could not be reached.

    Attributes:
        unreachable: Why; empty as long as it answers.
    """

    unreachable: str = ""

    def why_not(self, error: Exception) -> str:
        """Say, for the user, why the Hub did not answer, and what to do."""
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to ask the Hub"
        reason = (str(error).strip() or "no answer").splitlines()[0]
        if isinstance(error, HfHubHTTPError):
            return reason  # an answer: the next model may have a better one
        self.unreachable = f"{reason}; {ALONE}"
        return self.unreachable

    def why_missing(self, path: str, revision: str | None, wanted: str, cache_dir: str | None) -> str | None:
        """Why mergekit could not load the folder or Hub id ``path``, whose ``wanted`` file says what it is."""
        folder = Path(path)
        if folder.is_dir():
            return None if (folder / wanted).is_file() else f"the folder `{path}` has no {wanted}"
        what = next((one for one in ("adapter", "tokenizer") if wanted.startswith(one)), "model")
        missing = f"no {what} folder `{path}`{near(path)}"
        try:
            huggingface_hub.utils.validate_repo_id(path)  # type: ignore[attr-defined]
        except HFValidationError:
            return missing
        if isinstance(
            huggingface_hub.try_to_load_from_cache(path, wanted, cache_dir=cache_dir, revision=revision), str
        ):
            return None
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return f"{missing}, and it is not in the Hub cache (HF_HUB_OFFLINE is set: unset it to ask the Hub)"
        if self.unreachable:
            return f"{missing}, and the Hub could not be asked: {self.unreachable}"
        try:
            _ask(path, revision, wanted)
        except _NotLoadableError as error:
            return str(error)
        except RepositoryNotFoundError:
            return f"{missing}, and no such model on the Hub (if it is private, run `hf auth login`)"
        except Exception as error:  # whatever the HTTP client raises without a network
            return f"{missing}, and the Hub could not be asked: {self.why_not(error)}"
        return None

    def why_no_tokenizer(self, path: str, revision: str | None, cache_dir: str | None) -> str | None:
        """Why no tokenizer could be loaded from the folder or Hub id ``path``."""
        if Path(path).is_dir():
            found = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
            return None if found else f"the folder `{path}` has no tokenizer"
        return self.why_missing(path, revision, TOKENIZER_FILES[0], cache_dir)


class _NotLoadableError(Exception):
    """The Hub knows the model, and it cannot be loaded."""


def _ask(path: str, revision: str | None, wanted: str) -> None:
    try:
        api = huggingface_hub.HfApi()
        info = api.model_info(path, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(path)  # all may read about it, and not all its files
    except GatedRepoError as error:
        raise _NotLoadableError(
            f"`{path}` is gated: accept its conditions on the Hub, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise _NotLoadableError(f"`{path}` has no revision `{revision}` on the Hub") from error
    if info.siblings is not None and all(file.rfilename != wanted for file in info.siblings):
        raise _NotLoadableError(f"`{path}` on the Hub has no {wanted}")


def means_otherwise(value: str) -> str | None:
    """What mergekit makes of the name of a folder that is there, if it does not take it as it stands."""
    meant = {"+": "an adapter", "@": "a revision"}
    signs = [sign for sign in meant if sign in value]
    if not signs or not Path(value).is_dir():
        return None
    told = " and ".join(f"`{sign}` {meant[sign]}" for sign in signs)
    return f"`{value}` is a folder, and in a model's name {told} follows to mergekit: rename the folder"


def near(path: str) -> str:
    """A hint at what is there, where the last part of a path seems misspelt."""
    parent = Path(path).parent
    siblings = (
        [entry.name for entry in parent.iterdir() if entry.name != Path(path).name] if parent.is_dir() else []
    )
    close = difflib.get_close_matches(Path(path).name, siblings, n=1)
    return f" (did you mean `{parent / close[0]}`?)" if close else ""
