"""Real tokenizers: where their tokens end, what they stand for, what is mapped where. ``make test-real`` runs it.

    VARM_REAL=FOLDER make test-real

FOLDER holds checkpoints, or folders of a tokenizer.json and a tokenizer_config.json each, at any depth of two. The
oracles are a tokenizer's own names of its tokens, its own decoding, and Python's ``unicodedata``.
"""

import itertools
import json
import os
import random
import re
import unicodedata
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import tokenizer_zoo
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_trainer.alignment import vocabulary
from fusion_trainer.alignment.vocabulary import Ends, Vocabularies
from fusion_trainer.text.tokenizer import TextTokenizer, Tokens, load_tokenizer

REAL = Path(os.environ.get("VARM_REAL") or "no such folder")
FOLDERS = {
    path.parent.name: path.parent
    for depth in ("*", "*/*")
    for path in sorted(REAL.glob(f"{depth}/tokenizer.json"))
}
pytestmark = [pytest.mark.real, pytest.mark.skipif(not FOLDERS, reason="VARM_REAL names no folder of tokenizers")]

TEXTS = 500
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
NAMES = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<s>",
        "</s>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<think>",
    ),
    *(
        "<|eot_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<EOT>",
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "<unused7>",
        "</div>",
    ),
    *("<0x0A>", "[@BOS@]", "<table>", "<|reserved_special_token_7|>"),
]


@dataclass(frozen=True)
class Real:
    """A real tokenizer, read by its names alone."""

    reader: TextTokenizer

    @cached_property
    def state(self) -> dict[str, object]:
        state = json.loads(self.reader.tokenizer.backend_tokenizer.to_str())
        return {
            key: json.dumps(state[key], ensure_ascii=False) for key in ("normalizer", "pre_tokenizer", "decoder")
        }

    @cached_property
    def byte_level(self) -> bool:
        return "ByteLevel" in str(self.state["decoder"])

    @cached_property
    def added(self) -> dict[int, str]:
        return {token: mark.content for token, mark in self.reader.tokenizer.added_tokens_decoder.items()}

    def rewritten(self, text: str) -> bytes:
        """Piece by piece between the added tokens: those are not rewritten."""
        form = re.search(r'"NFK?C"', str(self.state["normalizer"]))
        names = "|".join(map(re.escape, sorted(set(self.added.values()) & set(NAMES), key=len, reverse=True)))
        pieces = re.split(f"({names})", text) if names else [text]
        if form:
            kind = form[0].strip('"')
            pieces[::2] = [unicodedata.normalize(kind, piece) for piece in pieces[::2]]  # type: ignore[arg-type]
        if not self.byte_level:
            pieces[::2] = [piece.replace("▁", " ") for piece in pieces[::2]]
        return "".join(pieces).encode().translate(None, self.without)

    @cached_property
    def without(self) -> bytes:
        """Bytes that a byte-level vocabulary lacks: the tokenizer passes over them (SmolLM2: ``\\x07``)."""
        known = self.reader.tokenizer.get_vocab()
        return bytes(byte for char, byte in BYTE_OF.items() if self.byte_level and char not in known)

    def heads(self, tokens: Tokens, text: str) -> list[bytes]:
        """What has been read after each token, by the names of the tokens."""
        put_before = '"always"' in str(self.state["pre_tokenizer"])  # a space, unless one is there
        read, heads, begins, whole = b"", [], put_before, self.rewritten(text)
        begun = tokens.ids[: len(self.reader.prefix)].tolist() == self.reader.prefix and tokens.ends[0] == 0
        for place, token in enumerate(tokens.ids.tolist()):
            name = self.reader.tokenizer.convert_ids_to_tokens(token)
            if begun and place < len(self.reader.prefix):
                heads.append(b"")
                continue
            if token in self.added and name.strip("▁"):
                read, begins = read + name.encode(), put_before
            else:
                piece = self._bytes(name)
                extra = begins and piece[:1] == b" " and not whole.startswith(b" ", len(read))
                read, begins = read + piece[extra:], False
            heads.append(read)
        return heads

    def _bytes(self, name: str) -> bytes:
        if self.byte_level:
            return bytes(BYTE_OF[char] for char in name)
        return (
            bytes.fromhex(name[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", name) else name.replace("▁", " ").encode()
        )

    def positions(self, tokens: Tokens, text: str) -> dict[int, int]:
        """Bytes of the text → the last position that has read just these, where the text can be cut there.

        Of two places between which the tokenizer reads nothing the first.
        """
        last = {head: place for place, head in enumerate(self.heads(tokens, text))}
        whole, found, at = self.rewritten(text), dict[int, int](), 0
        cut = self.rewritten("") + self.rewritten(text) == whole
        for place, char in enumerate(text):
            head, size, before = self.rewritten(text[:place]), len(char.encode()), cut
            if before and head in last and last[head] not in found.values():
                found[at] = last[head]
            following = self.rewritten(text[: place + 1])
            cut = following + self.rewritten(text[place + 1 :]) == whole
            if before and cut and following == head + char.encode():
                for inside in range(1, size):
                    if head + char.encode()[:inside] in last:
                        found[at + inside] = last[head + char.encode()[:inside]]
            at += size
        return found if last[whole] in found.values() else {**found, at: last[whole]}


@cache
def real(name: str) -> Real:
    return Real(load_tokenizer(FOLDERS[name], name))


@cache
def nasty_texts() -> list[str]:
    rng, agreed = random.Random(138_167), {}
    found = []
    while len(found) < TEXTS:
        pieces = [tokenizer_zoo.random_text(rng), *rng.choices([*tokenizer_zoo.REWRITTEN, *NAMES], k=4)]
        rng.shuffle(pieces)
        text = "".join(pieces)
        for char in set(text) - agreed.keys():
            agreed[char] = _same_in_all_versions(char)
        if all(agreed[char] for char in text):
            found.append(text)
    return found


def _same_in_all_versions(char: str) -> bool:
    """Whether Python's version of Unicode and the tokenizers' library's agree on a character."""
    forms = {"NFC": normalizers.NFC(), "NFKC": normalizers.NFKC()}
    assigned = unicodedata.category(char) != "Cn"
    return assigned and all(
        unicodedata.normalize(form, char) == one.normalize_str(char) for form, one in forms.items()
    )  # type: ignore[arg-type]


@cache
def read_by(name: str) -> tuple[list[Tokens], list[dict[int, int]]]:
    """Each text's tokens, and by the oracle which position stands for which byte."""
    one = real(name)
    tokens = one.reader.encode(nasty_texts())
    return tokens, [one.positions(*both) for both in zip(tokens, nasty_texts(), strict=True)]


def test_there_are_ten_tokenizers_and_texts_of_all_kinds() -> None:
    assert len(FOLDERS) >= 10
    everything = "".join(nasty_texts())
    assert all(piece in everything for piece in [*tokenizer_zoo.REWRITTEN, *NAMES])
    normalisers = {str(real(name).state["normalizer"]) for name in FOLDERS}
    assert any("NFKC" in one for one in normalisers)
    assert any("always" in str(real(name).state["pre_tokenizer"]) for name in FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_bytes_of_every_id_are_those_it_is_decoded_to_within_a_text(name: str) -> None:
    """A byte of a character decodes to U+FFFD, for the tokenizer and for the oracle alike."""
    reader = real(name).reader
    before = reader.tokenizer("a", add_special_tokens=False).input_ids
    head = reader.tokenizer.decode(before)
    wrong = []
    for token, surface in reader.surfaces.items():
        decoded = reader.tokenizer.decode([*before, token], clean_up_tokenization_spaces=False)
        if decoded != head + surface.decode(errors="replace"):
            wrong.append((token, decoded, surface))
    assert not wrong, (len(wrong), wrong[:5])
    assert len(reader.surfaces) > 30_000


@pytest.mark.parametrize("name", FOLDERS)
def test_each_position_stands_for_the_bytes_that_it_has_read(name: str) -> None:
    tokens, truth = read_by(name)
    wrong = []
    for text, one, true in zip(nasty_texts(), tokens, truth, strict=True):
        assert one.ends.tolist() == sorted(one.ends.tolist())
        found = {end: place for place, end in enumerate(one.ends.tolist())}
        if found != true:
            wrong.append(
                (
                    text,
                    {
                        end: (found.get(end), true.get(end))
                        for end in found.keys() | true.keys()
                        if found.get(end) != true.get(end)
                    },
                )
            )
    wrong.sort(key=lambda case: len(case[0]))
    assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize(("pivot", "source"), itertools.combinations(FOLDERS, 2))
def test_pairs_have_read_the_same_text_and_none_is_missed(pivot: str, source: str) -> None:
    (of_pivot, by_pivot), (of_source, by_source) = read_by(pivot), read_by(source)
    paired = 0
    for text, p, s, at_p, at_s in zip(nasty_texts(), of_pivot, of_source, by_pivot, by_source, strict=True):
        pairs = tokenizer_zoo.boundary_pairs(p, s)
        found = list(zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True))
        assert found == sorted((at_p[end], at_s[end]) for end in at_p.keys() & at_s.keys()), text
        paired += len(found)
    assert paired > 5 * TEXTS


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bos_stands_before_every_text_once(name: str) -> None:
    reader = real(name).reader
    config = json.loads((FOLDERS[name] / "tokenizer_config.json").read_text())
    bos = reader.tokenizer.bos_token
    if config.get("add_bos_token"):
        assert reader.prefix == [reader.tokenizer.bos_token_id]
    if bos:
        (with_it, without) = reader.encode([f"{bos}Hello", "Hello"])
        assert with_it.ids.tolist().count(reader.tokenizer.bos_token_id) == 1
        assert with_it.ends[0] == len(bos.encode())
        assert without.ids.tolist()[: len(reader.prefix)] == reader.prefix


BY_SIZE = sorted(FOLDERS, key=lambda name: (FOLDERS[name] / "tokenizer.json").stat().st_size)
MAPS = [("exact", *pair) for pair in itertools.permutations(BY_SIZE[::3], 2)]
MAPS += [("prefix", *pair) for pair in itertools.permutations(BY_SIZE[:2], 2)]


@pytest.mark.parametrize(("method", "source", "pivot"), MAPS)
def test_special_tokens_are_mapped_by_function_alone(method: str, source: str, pivot: str) -> None:
    ours, theirs = real(source).reader, real(pivot).reader
    some = sorted(ours.special)[:3]
    end = theirs.tokenizer.eos_token_id
    made = getattr(vocabulary, method)(Vocabularies(ours, theirs, Ends(tuple(some))))
    rows, columns = made.matrix.nonzero()
    special = {
        (int(s), int(p)) for s, p in zip(rows, columns, strict=True) if s in ours.special or p in theirs.special
    }
    functions = {theirs.tokenizer.bos_token_id, theirs.tokenizer.pad_token_id, end}
    assert {(token, end) for token in some} <= special
    assert all(s in ours.special and p in functions for s, p in special)
    assert made.mapped.sum() > 8_000
