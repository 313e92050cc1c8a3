"""Tokenizers of every kind that models have, and for each the truth of where its tokens end.

The truth follows from the vocabulary's own strings (GPT-2's alphabet of bytes, "▁", <0x0A>), laid along the text
one after the other, and never from offsets.
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import tiny_tokenizers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_trainer.alignment.pairing import Read, position_pairs
from fusion_trainer.alignment.positions import Pairs
from fusion_trainer.data.answers import places, whole_text
from fusion_trainer.text.tokenizer import TextTokenizer, Tokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|end_of_turn|>")
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
SPACE = "▁"


@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer.

    Attributes:
        name: Of a model that has it.
        tokenizer: With the special tokens ``SPECIAL``.
        before: What it puts before the text (``first``) or before every piece of it between special tokens
            (``pieces``): a space, unless one is there where ``unless_there``.
        normalize: What it does to the text; None where it leaves every byte as it is.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    before: str | None = None
    unless_there: bool = False
    normalize: Callable[[str], str] | None = None

    @cached_property
    def reader(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer, self.name)

    @cached_property
    def added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_vocab().values())

    @cached_property
    def text(self) -> dict[int, bytes]:
        """The bytes of the ids that are text: none of a kind's added tokens is."""
        return {token: surface for token, surface in self.surfaces.items() if token not in self.added}

    @cached_property
    def surfaces(self) -> dict[int, bytes]:
        """The bytes each id stands for, "▁" as a space."""
        return {
            token: name.encode() if token in self.added else _bytes_of(name, self._byte_level)
            for name, token in self.tokenizer.get_vocab().items()
        }

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in self.tokenizer.backend_tokenizer.to_str()

    def truth(self, tokens: Tokens, text: str) -> list[int]:
        """How many bytes of ``text`` are read after each token, BOS among them; fails where they do not fit."""
        assert self.normalize is None
        return self._laid_along(tokens, text.encode())

    def last_read(self, tokens: Tokens, text: str) -> dict[int, int | None]:
        """Bytes of the text → the last token after which just these have been read, or None.

        Of a tokenizer that rewrites the text only those bytes at which the text can be cut and both parts
        rewritten alone: there the tokens have read the rewritten head.
        """
        raw = text.encode()
        if self.normalize is None:
            last = {end: position for position, end in enumerate(self._laid_along(tokens, raw))}
            return {end: last.get(end) for end in range(len(raw) + 1)}
        whole = self._rewritten(text)
        last = {end: position for position, end in enumerate(self._laid_along(tokens, whole))}
        heads = {len(text[:cut].encode()): cut for cut in range(len(text) + 1)}
        return {
            end: last.get(len(head))
            for end, cut in heads.items()
            if (head := self._rewritten(text[:cut])) + self._rewritten(text[cut:]) == whole
        }

    def _rewritten(self, text: str) -> bytes:
        """Piece by piece between special tokens, as the tokenizer does it."""
        assert self.normalize
        pieces = self._special.split(text)
        return "".join(
            piece if number % 2 else self.normalize(piece) for number, piece in enumerate(pieces)
        ).encode()

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(re.escape(name) for name in self.tokenizer.get_added_vocab())})")

    def _laid_along(self, tokens: Tokens, raw: bytes) -> list[int]:
        """The tokens' bytes laid along ``raw``: where each ends."""
        before = "".join(self.tokenizer.convert_ids_to_tokens(self.reader.prefix)).encode()
        bos = 0 if raw.startswith(before) else len(self.reader.prefix)  # a text that begins with BOS gets no other
        ends, position, head = [0] * bos, 0, self.before is not None
        for token in tokens.ids[bos:].tolist():
            surface = self.surfaces[token]
            if token in self.added:
                head = self.before == "pieces"
            elif head:
                there = raw.startswith(b" " if self._byte_level else (b" ", SPACE.encode()), position)
                if not (self.unless_there and there):
                    assert surface.startswith(b" "), (self.name, surface)
                    surface = surface[1:]
                head = False
            position = self._after(token, surface, raw, position)
            ends.append(position)
        assert position == len(raw)
        return ends

    def _after(self, token: int, surface: bytes, raw: bytes, position: int) -> int:
        name = self.tokenizer.convert_ids_to_tokens(token).encode()
        if name.startswith(b"<0x") and raw.startswith(name, position):
            return position + len(name)  # Unigram reads "<0x0A>" in a text as the byte's token
        if raw.startswith(surface, position):
            return position + len(surface)
        for byte in surface:  # a "▁" that the text itself has reads as a space too
            size = len(SPACE.encode()) if byte == 0x20 and raw.startswith(SPACE.encode(), position) else 1
            assert size > 1 or raw[position] == byte, (self.name, surface, raw[position : position + 9])
            position += size
        return position


def _bytes_of(name: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTE_OF[char] for char in name)
    if len(name) == 6 and name.startswith("<0x"):
        return bytes.fromhex(name[3:5])
    return name.replace(SPACE, " ").encode()


def _gpt2() -> Kind:
    """No BOS, no space put before a text."""
    return Kind("gpt2", tiny_tokenizers.train("byte_level_bpe", special=SPECIAL))


def _roberta() -> Kind:
    """A space before every piece of text, and offsets that leave out white space; BOS and EOS."""
    tokenizer = tiny_tokenizers.train("byte_level_bpe", special=("<s>", "</s>", *SPECIAL))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    marks = [(mark, backend.token_to_id(mark)) for mark in ("</s>", "<s>")]
    backend.post_processor = processors.RobertaProcessing(*marks, trim_offsets=True, add_prefix_space=True)
    return Kind("roberta", tokenizer, before="pieces", unless_there=True)


def _qwen2() -> Kind:
    """NFC, words by an expression, untrimmed offsets."""
    tokenizer = tiny_tokenizers.train("byte_level_bpe", special=SPECIAL)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return Kind("qwen2", tokenizer, normalize=backend.normalizer.normalize_str)


def _llama() -> Kind:
    """SentencePiece's BPE as it was: a "▁" before every piece of text."""
    return Kind("llama", tiny_tokenizers.train("sentencepiece_bpe", special=SPECIAL), before="pieces")


def _mistral() -> Kind:
    """SentencePiece's BPE as it is now: a "▁" before the text alone, unless one is there."""
    tokenizer = tiny_tokenizers.train("sentencepiece_bpe", special=SPECIAL)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return Kind("mistral", tokenizer, before="first", unless_there=True)


def gemma(size: int = 600) -> Kind:
    """Spaces are "▁", nothing is put before a text."""
    tokenizer = tiny_tokenizers.train("sentencepiece_bpe", size=size, special=SPECIAL)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return Kind("gemma", tokenizer)


def _unigram() -> Kind:
    """Unigram with bytes to fall back to."""
    return Kind("unigram", tiny_tokenizers.train("unigram", special=SPECIAL), before="first", unless_there=True)


def _nfkc() -> Kind:
    """Unigram that rewrites its text, and makes one space of several."""
    tokenizer = tiny_tokenizers.train("unigram", special=SPECIAL)
    rewriting = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.backend_tokenizer.normalizer = rewriting
    return Kind("nfkc", tokenizer, before="first", unless_there=True, normalize=rewriting.normalize_str)


MAKERS: dict[str, Callable[[], Kind]] = {
    "gpt2": _gpt2,
    "roberta": _roberta,
    "qwen2": _qwen2,
    "llama": _llama,
    "mistral": _mistral,
    "gemma": gemma,
    "unigram": _unigram,
    "nfkc": _nfkc,
}
"""All kinds, by a model that has them."""
EXACT = ("gpt2", "roberta", "llama", "mistral", "gemma", "unigram")
"""Those that leave every byte of the text as it is."""
NORMALIZING = ("qwen2", "nfkc")


_made: dict[str, Kind] = {}


def kind(name: str) -> Kind:
    """One of ``MAKERS``, made once; for reading only."""
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


# Tokenizers that rewrite, whose tokens reach across what they rewrite


@dataclass(frozen=True)
class Rewriting:
    """A normaliser, and the same in Python, but for what it puts before a text."""

    normalizer: normalizers.Normalizer
    in_python: Callable[[str], str]


def _form(name: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Rewriting:
    return Rewriting(getattr(normalizers, name)(), partial(unicodedata.normalize, name))


def _without_accents(text: str) -> str:
    apart = unicodedata.normalize("NFD", text)
    return "".join(char for char in apart if not unicodedata.category(char).startswith("M"))


REWRITINGS = {
    **{name: _form(name) for name in ("NFC", "NFD", "NFKC", "NFKD")},
    "lower case": Rewriting(normalizers.Lowercase(), lambda text: "".join(char.lower() for char in text)),
    "accents": Rewriting(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), _without_accents),
    "strings": Rewriting(
        normalizers.Sequence([normalizers.Replace("...", "…"), normalizers.Replace("ab", "")]),
        lambda text: text.replace("...", "…").replace("ab", ""),
    ),
    "blanks": Rewriting(normalizers.Replace(Regex(r"\s+"), " "), lambda text: re.sub(r"\s+", " ", text)),
    "put before": Rewriting(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        lambda text: unicodedata.normalize("NFKC", text),
    ),
    "strip": Rewriting(normalizers.Strip(), lambda text: text.strip()),
}
REWRITTEN = [
    *("ｶﾞ", "ﾊﾟ", "ﾞ", "ガ", "か\u3099", "ㄱㅏ", "ㄱㅏㄴ", "가", "\u1100\u1161\u11a8", "한글"),
    *("™", "…", "...", "½", "ﬁ", "ﬃ", "ｆｕｌｌ", "㍿", "ﷺ", "①", "²", "Ⅷ", "\u00a0", "\u3000", "¨", "ŉ"),
    *("e\u0301", "é", "e\u0323\u0301", "e\u0301\u0323", "ế", "\u0301", "İ", "I\u0307", "Å", "Å", "Σς", "ÀB"),
    *(
        "🙂",
        "👩‍👩‍👧",
        "कि",
        "\u0958",
        "ড়",
        " ",
        "  ",
        "\n",
        " \n ",
        "a",
        "ab",
        "aab",
        "y",
        "b.",
        "..",
        "Hello you",
        "日本",
    ),
]
"""What some of ``REWRITINGS`` rewrite, and what they leave; all versions of Unicode agree on these characters."""


def rewriting_tokenizer(name: str, byte_level: bool) -> TextTokenizer:
    """A BPE without words: its tokens begin and end anywhere, also inside of what is rewritten."""
    rewriting, rng = REWRITINGS[name], random.Random(4)
    lines = ["".join(rng.choices(REWRITTEN, k=5)) for _ in range(2000)]
    tokenizer = Tokenizer(BPE() if byte_level else BPE(byte_fallback=True, unk_token="<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        lines = [line.replace(" ", SPACE) for line in lines]
        special = ["<unk>", *tiny_tokenizers.BYTES]
        trainer = BpeTrainer(vocab_size=700, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.normalizer = rewriting.normalizer
    tokenizer.train_from_iterator(lines, trainer)
    if not byte_level:
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = []
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        if SPACE not in json.dumps(state["normalizer"], ensure_ascii=False):
            both = [rewriting.normalizer, normalizers.Replace(" ", SPACE)]
            tokenizer.normalizer = normalizers.Sequence(both)
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), name)


# Tokenizers of a few tokens, for maps worked by hand


def byte_level(words: Sequence[str], added: Sequence[str] = (), **named: str) -> TextTokenizer:
    """Byte-level BPE with these tokens, in this order, then ``added`` ones; a space is written as itself.

    Each word needs its parts before it: two earlier words, or single bytes. ``named`` are special ones: eos_token.
    """
    char_of = bytes_to_unicode()
    names = ["".join(char_of[byte] for byte in word.encode()) for word in words]
    tokenizer = Tokenizer(BPE({name: token for token, name in enumerate(names)}, _merges(names)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added))
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named), "byte-level")


def _merges(names: Sequence[str]) -> list[tuple[str, str]]:
    return [
        next((name[:cut], name[cut:]) for cut in range(1, len(name)) if {name[:cut], name[cut:]} <= {*names})
        for name in names
        if len(name) > 1
    ]


def sentencepiece(
    words: Sequence[str], added: Sequence[str] = (), fallback: bool = False, **named: str
) -> TextTokenizer:
    """Unigram with these tokens, in this order, that reads as few as it can; a space is written as itself.

    ``<0x41>`` is a byte to fall back to. ``<unk>`` has the id 0, what is ``added`` the last ones.
    """
    pieces = [
        (word if word.startswith("<0x") else word.replace(" ", SPACE), -20.0 if word.startswith("<0x") else -1.0)
        for word in words
    ]
    tokenizer = Tokenizer(Unigram([("<unk>", -50.0), *pieces], 0, fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", *added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **named)
    return TextTokenizer(fast, "sentencepiece")


# Texts

FRAGMENTS = [
    *SPECIAL,
    "<s>",
    "</s>",
    " ",
    "  ",
    "     ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t",
    " \n  ",
    "▁",
    "\x00",
    "\x01\x1b\x7f",
    "\x85\xa0",
    "e\u0301",
    "o\u0302\u0323",
    "\u0301",
    "क्षि",
    "각",
    "가",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "🇩🇪",
    "\u200d",
    "\ufeff",
    "\u3000",
    "ﬁ",
    "㍿",
    "ﷺ",
    "½",
    "日本語のテキスト",
    "你好，世界！",
    "鿿",
    "𝔘𝔫𝔦",
    "Grüße, naïve café",
    "Hello, how are you?",
    " the quick brown fox",
    "def add(a, b):\n    return a + b\n",
    "3, 1, 2",
    "<0x0",
]


def random_text(rng: random.Random) -> str:
    """Of fragments and of characters of all planes of Unicode, assigned or not."""
    return "".join(
        rng.choice(FRAGMENTS) if rng.random() < 0.6 else "".join(_character(rng) for _ in range(rng.randint(1, 3)))
        for _ in range(rng.randint(0, 7))
    )


def _character(rng: random.Random) -> str:
    while True:
        plane = rng.choice((0, 0, 0, rng.randrange(17)))
        code = plane << 16 | rng.randrange(1 << rng.choice((7, 8, 11, 16)))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def boundary_pairs(pivot: Tokens, source: Tokens) -> Pairs:
    """The positions of two tokenised texts that correspond, if the whole text is one answer.

    Both get one more token and byte, so that every position predicts something.
    """
    size = 1 + max(int(tokens.ends.max(initial=0)) for tokens in (pivot, source))
    answers = (whole_text(size),)
    reads = []
    for tokens in (pivot, source):
        longer = Tokens(np.append(tokens.ids, 0), np.append(tokens.ends, size))
        reads.append(Read(longer, answers, (), places(longer, b" " * size, answers)))
    return position_pairs(reads[0], reads[1], (kind("gpt2").reader, kind("gpt2").reader), None)
