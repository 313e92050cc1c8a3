"""Reads a repository on the Hub, compares files with it, and explains what the Hub refuses.

Tokens are removed from every message.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from varm_common.errors import UserError
from varm_merge.publishing.card import README, Card, Findings, Parent, is_generated, license_in, only_renews

__all__ = ["Change", "Remote", "check_name", "compare", "edited", "explained", "guard_logs", "look", "parent_at"]

TIMEOUT_S = 10
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
"""The files among which transformers chooses. Old ones left beside new ones could be loaded instead."""
TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|(?i:bearer) +[^\s'\"]+|(?<=://)[^/@\s]+@|(?<=[?&])[^\s'\"]*(?i:signature|token)=[^\s'\"]*"
)


@dataclass(frozen=True)
class Change:
    """The change of a file by a push; ``state`` is ``new``, ``changed``, ``same``, ``kept`` or ``removed``."""

    path: str
    size: int
    state: str
    operation: CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class Remote:
    """A repository as it is on the Hub; a branch that does not exist has the files it would start from.

    ``commit`` is the branch's last one; None if the branch, or the repository, does not exist.
    """

    exists: bool = False
    private: bool = True
    commit: str | None = None
    files: Mapping[str, RepoSibling] = field(default_factory=dict)


def check_name(repository: str) -> None:
    """Check that a repository is named by user and name.

    Raises:
        UserError: It is not.
    """
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise errors.HFValidationError("the user is missing")
    except errors.HFValidationError as error:
        raise UserError(f"`{repository}` is not a repository name; write user/name ({error})") from error


def look(repository: str, revision: str | None = None) -> Remote:
    """Read the state of a repository.

    Raises:
        UserError: The Hub does not answer, or refuses this token.
    """
    with explained(repository):
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except errors.RevisionNotFoundError:
            return replace(look(repository), commit=None)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return Remote()
    return Remote(True, bool(info.private), info.sha, {file.rfilename: file for file in info.siblings or []})


def compare(files: Mapping[str, Path | bytes], remote: Remote, quiet: bool = True) -> list[Change]:
    """Compare local files with those of a repository, by size and hash."""
    changes = []
    for path, content in tqdm(sorted(files.items()), unit="file", desc="compare", disable=quiet, leave=False):
        addition = CommitOperationAdd(path, content)
        known = remote.files.get(path)
        state = "new" if known is None else "same" if _is_same(addition, known) else "changed"
        changes.append(Change(path, addition.upload_info.size, state, addition))
    return changes + [
        Change(path, int(old.size or 0), "removed", CommitOperationDelete(path))
        for path, old in sorted(remote.files.items())
        if path not in files and WEIGHTS.fullmatch(path)
    ]


def _is_same(addition: CommitOperationAdd, known: RepoSibling) -> bool:
    if addition.upload_info.size != (known.size or 0):
        return False
    if known.lfs:
        return addition.upload_info.sha256.hex() == known.lfs.sha256
    with addition.as_file() as file:
        return git_hash(file.read()) == known.blob_id


def edited(repository: str, remote: Remote, card: Card) -> bool:
    """Whether a person wrote or edited the repository's card, and ``card`` would change what they wrote."""
    known = remote.files.get(README)
    if known is None or _is_same(CommitOperationAdd(README, card.text.encode()), known):
        return False
    with explained(repository):
        content = Path(HfApi().hf_hub_download(repository, README, revision=remote.commit)).read_bytes()
    try:
        text = content.decode("utf-8-sig")
        return not is_generated(text) and (card.generated or not only_renews(card.text, text))
    except (ValueError, TypeError, yaml.YAMLError):  # no push has written this card
        return True


def parent_at(name: str, role: str, findings: Findings) -> Parent:
    """Look up a model of the recipe on the Hub, or in its folder if it is one."""
    if _may_be_hub_id(name):
        try:
            with explained(name):
                info = HfApi().model_info(name, timeout=TIMEOUT_S)
            return Parent(name, role, info.id or name, license_in(vars(info.card_data) if info.card_data else {}))
        except UserError as error:
            if not isinstance(error.__cause__, errors.RepositoryNotFoundError):
                findings.remarks.append(f"the licence of `{name}` is unknown: {error}")
                return Parent(name, role, name)
            reason = f"`{name}` is neither a folder here nor a model on the Hub"
            findings.remarks.append(f"{reason}; the card's metadata omit it")
    try:
        metadata = huggingface_hub.metadata_load(Path(name).expanduser() / README) or {}
    except (ValueError, OSError, yaml.YAMLError):  # the folder may no longer exist
        metadata = {}
    return Parent(name, role, None, license_in(metadata))


def _may_be_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name[0] not in ".~" and not Path(name).exists()


# Tokens and errors


def redact(text: str) -> str:
    """Remove tokens from a text: the user's own, anything that looks like one, and secrets in URLs."""
    if token := huggingface_hub.get_token():
        text = text.replace(token, "<token>")
    return TOKENS.sub("<token>", text)


class _Redacting(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return redact(self.inner.format(record))


def guard_logs() -> None:
    """Remove tokens from what the libraries log, at any level."""
    logging.captureWarnings(True)
    for name in ("", "huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, _Redacting):
                handler.setFormatter(_Redacting(handler.formatter or logging.Formatter()))


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn every error between here and the Hub into a sentence for the user, without tokens."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from huggingface_hub, its HTTP client, or the disk
        raise UserError(redact(_sentence(repository, error))) from error


def _sentence(repository: str, error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        last = cause
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            reply = str(cause.server_message or "").strip().splitlines()
            return _advice(repository, cause) + (f" (the Hub says: {reply[0][:300]})" if reply else "")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, so `{repository}` cannot be reached: unset it"
        if isinstance(cause, OSError) and cause.filename:
            return f"`{cause.filename}` cannot be read: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError):
        return f"`{repository}`: {error}"
    endpoint = huggingface_hub.constants.ENDPOINT
    return f"the connection to {endpoint} failed ({type(last).__name__}: {last}): {AGAIN}"


AGAIN = "run the same command again; files that have arrived are not sent again"
ADVICE = {
    400: "the Hub rejected the upload to `{0}`",
    401: "the Hub does not recognise you: run `hf auth login`, or set HF_TOKEN to a token that may write to `{0}`",
    402: "`{0}` has no storage left: free some, get a paid plan, or push with --public",
    403: "your token may not write to `{0}`: it needs the `write` role or a fine-grained permission; "
    "`hf auth whoami` shows your account",
    404: "`{0}` is not on the Hub, or you have no access; `hf auth whoami` shows your account",
    409: "somebody else is changing `{0}`: run the same command again",
    412: "somebody committed to `{0}` in the meantime: check that commit, then run the same command again",
    413: "the Hub does not take files this large: merge with --out-shard-size 5B",
    429: "the Hub received too many requests: wait some minutes, then " + AGAIN,
}


def _advice(repository: str, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"`{repository}` is gated: accept its conditions on the Hub, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError) and status == 401 and huggingface_hub.get_token():
        status = 404
    if status >= 500:
        return f"the Hub failed with status {status} for `{repository}`: {AGAIN}"
    return ADVICE.get(status, f"the Hub replied with status {status} for `{{0}}`").format(repository)
