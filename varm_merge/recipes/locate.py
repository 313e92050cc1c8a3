"""Whether a model that a recipe names is there: as a folder, in the Hub's cache, or on the Hub."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from varm_common.errors import closest

__all__ = ["TOKENIZER_FILES", "Hub", "near", "why_misread"]

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass
class Hub:
    """The Hub. Once it could not be reached, no further request is sent.

    Attributes:
        unreachable: Why it cannot be reached; empty while it answers.
    """

    unreachable: str = ""

    def why_not(self, error: Exception) -> str:
        """Why the Hub did not answer, and what to do."""
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to use the Hub"
        reason = (str(error).strip() or "no answer").splitlines()[0]
        if isinstance(error, errors.HfHubHTTPError):
            return reason  # it has answered, and may answer for the next model
        self.unreachable = f"{reason}; `varm-merge check --offline` checks only the recipe"
        return self.unreachable

    def why_missing(self, path: str, revision: str | None, wanted: str, cache_dir: str | None) -> str | None:
        """Why mergekit could not load the folder or Hub id ``path``; None if its file ``wanted`` is there."""
        if Path(path).is_dir():
            return None if (Path(path) / wanted).is_file() else f"the folder `{path}` has no {wanted}"
        what = wanted.partition("_")[0] if wanted.startswith(("adapter", "tokenizer")) else "model"
        missing = f"no {what} folder `{path}`{near(path)}"
        try:
            cached = huggingface_hub.try_to_load_from_cache(path, wanted, cache_dir=cache_dir, revision=revision)
        except errors.HFValidationError:
            return missing
        if isinstance(cached, str):
            return None
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return f"{missing}, and it is not in the Hub cache (HF_HUB_OFFLINE is set: unset it to use the Hub)"
        if self.unreachable:
            return f"{missing}, and the Hub did not answer: {self.unreachable}"
        try:
            return _refusal(path, revision, wanted)
        except errors.RepositoryNotFoundError:
            return f"{missing}, and no such model on the Hub (if it is private, run `hf auth login`)"
        except Exception as error:  # the HTTP client raises errors of many kinds
            return f"{missing}, and the Hub did not answer: {self.why_not(error)}"

    def why_no_tokenizer(self, path: str, revision: str | None, cache_dir: str | None) -> str | None:
        """Why no tokenizer could be loaded from the folder or Hub id ``path``."""
        if Path(path).is_dir():
            has_tokenizer = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
            return None if has_tokenizer else f"the folder `{path}` has no tokenizer"
        return self.why_missing(path, revision, TOKENIZER_FILES[0], cache_dir)


def _refusal(path: str, revision: str | None, wanted: str) -> str | None:
    """Why a model that the Hub has cannot be loaded."""
    api = huggingface_hub.HfApi()
    try:
        info = api.model_info(path, revision=revision, timeout=10)  # seconds
        if info.gated:
            api.auth_check(path)  # everyone may see a gated model, and not everyone may download it
    except errors.GatedRepoError:
        return f"`{path}` is gated: accept its conditions on the Hub, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        return f"`{path}` has no revision `{revision}` on the Hub"
    if info.siblings is not None and all(file.rfilename != wanted for file in info.siblings):
        return f"`{path}` on the Hub has no {wanted}"
    return None


def why_misread(value: str) -> str | None:
    """Why mergekit does not find a folder that is there: it reads its name as two names."""
    meanings = {"+": "an adapter", "@": "a revision"}
    signs = [sign for sign in meanings if sign in value]
    if not signs or not Path(value).is_dir():
        return None
    starts = " and ".join(f"`{sign}` as the start of {meanings[sign]}" for sign in signs)
    return f"`{value}` is a folder, and mergekit reads {starts}: rename the folder"


def near(path: str) -> str:
    """A hint at a similar name in the same folder."""
    parent, name = Path(path).parent, Path(path).name
    siblings = [entry.name for entry in parent.iterdir() if entry.name != name] if parent.is_dir() else []
    similar = closest(name, siblings)
    return f" (did you mean `{parent / similar}`?)" if similar else ""
