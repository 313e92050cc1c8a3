"""Sends a merged model to the Hub: whole or not at all, nothing twice, and never the token to anybody else.

The large files go first, a group at a time, and become part of the repository by one commit at the end. A push
that was cut off is made again by the same command: what has arrived is known by its hash and not sent again (but a
part of a file is, where ``hf_xet`` is not used). Readers of the repository see the old model or the new one.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from varm_merge.errors import VarmError
from varm_merge.model_card import README, Card, Parent, is_generated, license_in, local_parent, only_renews

__all__ = [
    "Change",
    "Content",
    "Remote",
    "card_is_edited",
    "compare",
    "guard_logs",
    "look_at",
    "parent_at",
    "redact",
    "upload",
]

GROUP_BYTES = 5_000_000_000
"""Of large files that are made sure of before the next are sent."""
TIMEOUT_SECONDS = 10
"""For questions."""
STALLED_SECONDS = 300
"""In which nothing at all is sent or answered before an upload counts as cut off; the client would wait on."""
WEIGHTS = (
    r"model\.safetensors(\.index\.json)?|pytorch_model\.bin(\.index\.json)?"
    r"|(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)"
)
"""Files from which transformers chooses what it loads: old ones beside the new would be another model."""
TOKENS = (
    r"hf_[A-Za-z0-9]{8,}|(?i:bearer) +[^\s'\"]+|(?<=://)[^/@\s]+@|(?<=[?&])[^\s'\"]*(?i:signature|token)=[^\s'\"]*"
)
GITATTRIBUTES = ".gitattributes"
"""Which the Hub itself puts into what it makes."""
CHUNK_BYTES = 1 << 20

Content = Path | bytes


@dataclass(frozen=True)
class Change:
    """A file and what a push does with it: ``new``, ``changed``, ``same``, ``kept`` or ``removed``."""

    path: str
    size: int
    state: str
    content: Content | None = None


@dataclass(frozen=True)
class Remote:
    """A repository as it is: ``sums`` is (size, SHA-256 or None, git's hash or None) of each file."""

    exists: bool = False
    private: bool = True
    commit: str | None = None
    has_revision: bool = True
    sums: Mapping[str, tuple[int, str | None, str | None]] = field(default_factory=dict)


# Looking


def look_at(repository: str, revision: str | None = None) -> Remote:
    """What the Hub has; of a revision that is not there, what it would start from.

    Raises:
        VarmError: The Hub does not answer, or not to this token.
    """
    with _told(repository):
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        except RevisionNotFoundError:
            found = look_at(repository)
            return Remote(found.exists, found.private, None, False, found.sums)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote()
    sums = {
        file.rfilename: (int(file.size or 0), file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in info.siblings or []
    }
    return Remote(True, bool(info.private), info.sha, True, sums)


def compare(files: Mapping[str, Content], remote: Remote, quiet: bool = True) -> list[Change]:
    """What a push would do with each file, by its hash."""
    changes = []
    for path, content in tqdm(sorted(files.items()), unit="file", desc="compare", disable=quiet, leave=False):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        state = "new" if path not in remote.sums else "same" if _same(content, remote.sums[path]) else "changed"
        changes.append(Change(path, size, state, content))
    old = [
        Change(path, size, "removed")
        for path, (size, _, _) in sorted(remote.sums.items())
        if path not in files and re.fullmatch(WEIGHTS, path)
    ]
    return changes + old


def _same(content: Content, known: tuple[int, str | None, str | None]) -> bool:
    size, sha256, blob = known
    own = len(content) if isinstance(content, bytes) else content.stat().st_size
    if own != size:
        return False
    digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % size)
    for chunk in _chunks(content):
        digest.update(chunk)
    return digest.hexdigest() == (sha256 or blob)


def _chunks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def card_is_edited(repository: str, remote: Remote, card: Card) -> bool:
    """Whether the repository has a card that a person wrote or edited, and ``card`` would take something of it."""
    if README not in remote.sums or _same(card.text.encode(), remote.sums[README]):
        return False
    with _told(repository):
        content = Path(HfApi().hf_hub_download(repository, README, revision=remote.commit)).read_bytes()
    try:
        text = content.decode("utf-8-sig")
        return not is_generated(text) and (card.generated or not only_renews(card.text, text))
    except (ValueError, TypeError, yaml.YAMLError):  # no card that a push has sent
        return True


def parent_at(name: str, role: str, may_be_hub_id: bool, remarks: list[str]) -> Parent:
    """A model of the recipe: on the Hub if it is known there, else a folder."""
    if not may_be_hub_id:
        return local_parent(name, role)
    try:
        with _told(name):
            info = HfApi().model_info(name, timeout=TIMEOUT_SECONDS)
    except VarmError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            remarks.append(f"`{name}` is no folder here and no model on the Hub: the card's metadata leave it out")
            return local_parent(name, role)
        remarks.append(f"the licence of `{name}` is not known: {error}")
        return Parent(name, role, name)
    metadata = vars(info.card_data) if info.card_data else {}
    return Parent(name, role, info.id or name, license_in(metadata))


# Sending


def upload(
    repository: str,
    changes: Sequence[Change],
    remote: Remote,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str,
) -> Any:
    """Create the repository if need be, send what is new or changed, and commit it.

    Returns:
        huggingface_hub's ``CommitInfo``.

    Raises:
        VarmError: Something failed; the repository is as it was, and the same call goes on.
    """
    api = HfApi()
    sent = [change for change in changes if change.state in ("new", "changed")]
    with _told(repository):
        huggingface_hub.get_session().timeout = STALLED_SECONDS
        additions = [CommitOperationAdd(change.path, _plain(change.content)) for change in sent]
        if card := next((change for change in sent if change.path == README), None):
            assert isinstance(card.content, bytes)
            huggingface_hub.ModelCard(card.content.decode()).validate()
        if not remote.exists:
            api.create_repo(repository, private=not public, exist_ok=True)
        if not remote.has_revision or (revision and not remote.exists and revision != "main"):
            api.create_branch(repository, branch=str(revision), exist_ok=True)
        if not remote.exists or not remote.has_revision:
            remote = _as_made(repository, revision, remote)
        for group in _groups(additions):
            api.preupload_lfs_files(
                repository, additions=group, revision=revision, create_pr=create_pr, free_memory=False
            )
        removed = [CommitOperationDelete(change.path) for change in changes if change.state == "removed"]
        return api.create_commit(
            repository,
            [*additions, *removed],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else remote.commit,
        )


def _as_made(repository: str, revision: str | None, before: Remote) -> Remote:
    """A repository or branch that was just made; another push may have made it first, and filled it."""
    made = look_at(repository, revision)
    known, found = ({**one.sums, GITATTRIBUTES: None} for one in (before, made))
    if known != found:
        raise VarmError(ADVICE[412].format(repository))
    return made


def _plain(content: Content | None) -> str | bytes:
    assert content is not None
    return content if isinstance(content, bytes) else str(content)


def _groups(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    group: list[CommitOperationAdd] = []
    size = 0
    for addition in additions:
        if group and size + addition.upload_info.size > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(addition)
        size += addition.upload_info.size
    if group:
        yield group


# Errors, and what is never told


def redact(text: str) -> str:
    """A text without tokens: those of this user, what looks like one, passwords and signatures in addresses."""
    if token := huggingface_hub.get_token():
        text = text.replace(token, "<token>")
    return re.sub(TOKENS, "<token>", text)


class _Redacted(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return redact(self.inner.format(record))


def guard_logs() -> None:
    """Keep tokens out of what the libraries log and warn of, at any level."""
    logging.captureWarnings(True)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    for name in ("", "huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, _Redacted):
                handler.setFormatter(_Redacted(handler.formatter or logging.Formatter()))


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub, in a sentence."""
    try:
        yield
    except VarmError:
        raise
    except Exception as error:  # of the client, of what it is built on, of the files it reads
        raise VarmError(redact(_sentence(repository, error))) from error


def _sentence(repository: str, error: Exception) -> str:
    chain = list(_chain(error))
    answered = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
    if answered is not None and answered.response is not None:
        said = str(answered.server_message or "").strip().splitlines()
        told = f" (the Hub says: {said[0][:300]})" if said else ""
        return _advice(repository, answered, answered.response.status_code) + told
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return f"HF_HUB_OFFLINE is set, so `{repository}` cannot be reached: unset it"
    unread = next((one for one in chain if isinstance(one, OSError) and one.filename), None)
    if unread is not None:
        return f"`{unread.filename}` cannot be read: {unread.strerror}"
    if isinstance(error, ValueError):
        return f"`{repository}`: {error}"
    endpoint = huggingface_hub.constants.ENDPOINT
    by_xet = find_spec("hf_xet") is not None and not huggingface_hub.constants.HF_HUB_DISABLE_XET
    without = "; HF_HUB_DISABLE_XET=1 sends without hf_xet" if by_xet else ""
    return f"the connection to {endpoint} failed ({type(chain[-1]).__name__}: {chain[-1]}): {AGAIN}{without}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


AGAIN = "run the same command again, what has arrived is not sent again"
ADVICE = {
    400: "the Hub refused what was sent to `{0}`",
    401: "the Hub does not know you: run `hf auth login`, or set HF_TOKEN to a token that may write to `{0}`",
    402: "`{0}` has no room left: the Hub wants a paid plan for it; free some, or push it --public",
    403: "your token may not write to `{0}`: it needs the `write` role, or a fine-grained permission for it; "
    "`hf auth whoami` says who you are",
    404: "`{0}` is not on the Hub, or not for you: `hf auth whoami` says who you are",
    409: "`{0}` is being changed by somebody else: run the same command again",
    412: "somebody committed to `{0}` while this ran: look at what came, then run the same command again",
    413: "the Hub takes no files of this size: merge with --out-shard-size 5B",
    429: "the Hub wants fewer requests: wait some minutes, then " + AGAIN,
}


def _advice(repository: str, error: HfHubHTTPError, status: int) -> str:
    if isinstance(error, GatedRepoError):
        return f"`{repository}` is gated: accept its conditions on the Hub, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError) and status == 401 and huggingface_hub.get_token():
        status = 404
    if status >= 500:
        return f"the Hub had an error ({status}) over `{repository}`: {AGAIN}"
    return ADVICE.get(status, f"the Hub answered {status} about `{{0}}`").format(repository)
