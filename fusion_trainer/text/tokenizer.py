"""Any tokenizer's ids for a text, and the byte of the text at which each token ends.

The ends follow from the bytes that the tokens stand for (``byte_ends``). If those do not make up the text (a
tokenizer that changes to lower case, an unknown token), the ends are the tokenizer's own offsets, and bytes only
separate tokens whose offsets overlap.

A token is supervised when it ends inside a supervised span, whatever the tokenizer: a leading space that a token
shares with the template before the span does not exclude it, and a token that reaches beyond the span belongs to
the template.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, normalizers

from fusion_trainer.text.byte_ends import Rewriting, lay_along
from varm_common.errors import UserError, reason_of
from varm_common.models import read_tokenizer

__all__ = ["Span", "TextTokenizer", "Tokens", "load_tokenizer", "supervised_positions"]

SPACES_AS_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
"""The normaliser of SentencePiece-style tokenizers that writes spaces as ``▁``."""
OBEYS_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")
"""Classes whose fast version in transformers 4 left out BOS if ``add_bos_token`` was false."""
Span = tuple[int, int]
"""First byte and the one after the last, in a text's UTF-8."""


@dataclass(frozen=True)
class Tokens:
    """A text as one tokenizer reads it.

    Attributes:
        ids: int32 [tokens].
        ends: int32 [tokens], ascending: bytes of the text (UTF-8) that are read once the token is; 0 for a BOS
            that is not in the text. If several tokens have the same end, only the last has read up to there; the
            others end inside something that a normaliser rewrote, and correspond to no byte of the text.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)


def supervised_positions(tokens: Tokens, spans: Sequence[Span]) -> NDArray[np.int32]:
    """The positions whose *next* token is supervised: there a model predicts the assistant's words.

    Args:
        tokens: The tokenised text.
        spans: Supervised bytes, ascending and disjoint.

    Returns:
        int32 [positions], ascending. The token after position p ends inside a span, and does not begin at its end.
        The first token of a text is predicted only if there is a BOS before it.
    """
    if not spans or len(tokens) < 2:
        return np.empty(0, np.int32)
    starts, stops = np.array(spans, np.int32).T
    ends = tokens.ends[1:]
    span = np.searchsorted(stops, ends, side="left")
    inside = span < len(stops)
    before = tokens.ends[:-1]
    inside[inside] = (ends[inside] > starts[span[inside]]) & (before[inside] < stops[span[inside]])
    return np.flatnonzero(inside).astype(np.int32)


class TextTokenizer:
    """A tokenizer of transformers, with the ends of tokens in bytes, and BOS as the tokenizer itself adds it."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer of {name} ({type(tokenizer).__name__}) does not report which characters a token "
                "covers; convert it to a tokenizer.json (save it once with a transformers that has its fast class)"
            )
        self.tokenizer = tokenizer
        self.name = name
        plain = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        self.prefix: list[int] = full[: starts[0]] if starts else []
        """The ids this tokenizer puts before every text: BOS, or nothing."""
        if not self.prefix and _template_begins_with_bos(tokenizer):
            self.prefix = [tokenizer.bos_token_id]

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise texts. ``prefix`` is put before those that do not begin with it, or with BOS, themselves."""
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        columns = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
        return [self._tokens(text, ids, offsets) for text, ids, offsets in columns]

    def _tokens(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
        has_bos = ids[: len(self.prefix)] == self.prefix or ids[:1] == [self.tokenizer.bos_token_id]
        prefix = [] if has_bos else self.prefix
        marks = [self.marks.get(token) for token in ids]
        ends = lay_along(text, [self.surfaces[token] for token in ids], marks, self._rewriting)
        if ends is None:
            spans_T2 = _in_bytes(text, np.array(offsets, np.int32))
            self._separate(text.encode(), ids, spans_T2)
            ends = self._rewriting.finished(text, spans_T2[:, 1])
        before = np.zeros(len(prefix), np.int32)
        return Tokens(np.array([*prefix, *ids], np.int32), np.concatenate([before, ends]))

    def _separate(self, text: bytes, ids: list[int], spans_T2: NDArray[np.int32]) -> None:
        """Set the ends of tokens whose spans overlap by the bytes that they stand for."""
        starts, ends = spans_T2.T
        read = np.maximum.accumulate(ends)
        apart = np.flatnonzero(starts[1:] >= read[:-1]) + 1
        bounds = np.array([0, *apart, len(ids)])
        for group in np.flatnonzero(np.diff(bounds) > 1):
            first, last = int(bounds[group]), int(bounds[group + 1])
            start, stop = int(starts[first:last].min()), int(read[last - 1])
            sizes = [len(self.surfaces[token]) for token in ids[first:last]]
            joined = b"".join(self.surfaces[token] for token in ids[first:last])
            covered = text[start:stop]
            if joined != covered and joined[1:] == covered[-len(joined) + 1 :] and joined[:1] == b" ":
                sizes[0] -= 1  # the space that SentencePiece puts before a text
                joined = joined[1:]
            if covered.endswith(joined):  # what precedes is white space that trimmed offsets leave out
                ends[first:last] = stop - len(joined) + np.cumsum(sizes)
            else:
                ends[first:last] = stop

    @cached_property
    def surfaces(self) -> dict[int, bytes]:
        """The bytes of text that each id stands for."""
        vocabulary = self.tokenizer.get_vocab().items()
        if not self._byte_level:
            return {token: _sentencepiece_surface(name) for name, token in vocabulary}
        table = _byte_of_char()
        return {
            token: bytes(table[char] for char in name)
            if token not in self.added and table.keys() >= {*name}
            else name.encode()
            for name, token in vocabulary
        }

    @cached_property
    def marks(self) -> dict[int, AddedToken]:
        """The added tokens that are in a text under their own names: all but bytes and plain white space."""
        return {
            token: mark
            for token, mark in self.tokenizer.added_tokens_decoder.items()
            if token in self.added - self.byte_fallback and self.surfaces[token].strip()
        }

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text: those marked as special, and the named ones (BOS, EOS, padding, unknown)."""
        marked = {token for token, mark in self.tokenizer.added_tokens_decoder.items() if mark.special}
        return (frozenset(marked | set(self.tokenizer.all_special_ids)) & self.vocabulary) - self.byte_fallback

    @cached_property
    def _rewriting(self) -> Rewriting:
        state = self._state
        steps = [step for step in _steps(state["normalizer"]) if step["type"] != "Prepend"]  # of a space
        lacking = b""
        if self._byte_level and state["model"].get("unk_token") is None:
            vocabulary = self.tokenizer.get_vocab()
            lacking = bytes(byte for char, byte in _byte_of_char().items() if char not in vocabulary)
        if not steps or (steps == [SPACES_AS_MARKS] and not self._byte_level):
            return Rewriting(self._byte_level, None, lacking)
        normaliser = normalizers.Sequence([])
        normaliser.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
        return Rewriting(self._byte_level, normaliser.normalize_str, lacking)

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in str(self._state["decoder"])

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The content of tokenizer.json without the vocabulary."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for large in ("vocab", "merges"):
            state["model"].pop(large, None)
        return {**state, "added_tokens": None}

    @cached_property
    def words(self) -> dict[int, str]:
        """Each id's text without spaces, as the papers compare tokens."""
        texts = {token: raw.decode(errors="surrogateescape") for token, raw in self.surfaces.items()}
        return {token: text.replace(" ", "") for token, text in texts.items()}

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of tokens added to the vocabulary, which stand for their own names."""
        return frozenset(self.tokenizer.get_added_vocab().values())

    @cached_property
    def byte_fallback(self) -> frozenset[int]:
        """Ids that stand for one byte each, such as ``<0x0A>``; none if all tokens are bytes."""
        if self._byte_level:
            return frozenset()
        return frozenset(token for name, token in self.tokenizer.get_vocab().items() if _is_byte(name))

    @cached_property
    def vocabulary(self) -> frozenset[int]:
        """Every id that stands for a token; a model may have more rows than these."""
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of everything that turns text into ids: the tokenizer's state and the ids before a text."""
        backend = self.tokenizer.backend_tokenizer
        truncation, padding = backend.truncation, backend.padding
        backend.no_truncation()
        backend.no_padding()
        state = backend.to_str()
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)
        return hashlib.sha256(f"{state}{self.prefix}".encode()).hexdigest()


def _steps(normaliser: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalisers in a tokenizer.json, one after the other."""
    if normaliser is None:
        return []
    if normaliser["type"] == "Sequence":
        return [step for part in normaliser["normalizers"] for step in _steps(part)]
    return [normaliser]


def _template_begins_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer that adds no BOS has a chat template that does."""
    if not tokenizer.bos_token or not tokenizer.chat_template:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception:  # a template may demand other turns
        return False
    return bool(str(text).startswith(tokenizer.bos_token))


def _in_bytes(text: str, offsets_T2: NDArray[np.int32]) -> NDArray[np.int32]:
    """Offsets in characters of ``text`` as offsets in its UTF-8."""
    if text.isascii():
        return offsets_T2
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int32) + (points >= 0x800) + (points >= 0x10000)
    before = np.zeros(len(points) + 1, np.int32)
    np.cumsum(sizes, out=before[1:])
    return before[offsets_T2]


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE, in which each byte is one printable character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def _is_byte(name: str) -> bool:
    return len(name) == len("<0x00>") and name.startswith("<0x") and name.endswith(">")


def _sentencepiece_surface(name: str) -> bytes:
    if _is_byte(name):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> TextTokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        UserError: There is none, or it does not say which characters its tokens cover.
    """
    return _loaded(folder.absolute(), name, trust_remote_code)  # a relative path means another after a chdir


@lru_cache(maxsize=8)
def _loaded(folder: Path, name: str, trust_remote_code: bool) -> TextTokenizer:
    try:
        tokenizer = read_tokenizer(folder, name, trust_remote_code)
    except Exception as error:
        if not trust_remote_code and not isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            raise
        raise UserError(f"no tokenizer of {name} could be loaded: {reason_of(error)}") from error
    _obey_add_bos(tokenizer, folder)
    return TextTokenizer(tokenizer, name)


def _obey_add_bos(tokenizer: Any, folder: Path) -> None:
    """Make a tokenizer add BOS, or not, as its ``tokenizer_config.json`` says.

    transformers 5 ignores ``add_bos_token`` if there is a tokenizer.json. Here true is always obeyed, false if
    transformers 4 did. The tokenizer keeps it when it is saved.
    """
    path = folder / "tokenizer_config.json"
    if tokenizer.bos_token is None or not getattr(tokenizer, "is_fast", False) or not path.is_file():
        return
    config = json.loads(path.read_bytes())
    wanted = config.get("add_bos_token")
    adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    obeys = str(config.get("tokenizer_class")).removesuffix("Fast") in OBEYS_ADD_BOS
    if (wanted is True and not adds) or (wanted is False and adds and obeys):
        tokenizer.add_bos_token = wanted
