"""The byte of a text at which each token ends, for every kind of tokenizer, against the vocabulary's own bytes."""

import copy
import json
import random
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, shared, train
from tokenizer_zoo import REWRITINGS, REWRITTEN, byte_level, rewriting_tokenizer
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_trainer.text.tokenizer import TextTokenizer, Tokens, load_tokenizer, supervised_positions
from varm_common.errors import UserError

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>")
BYTES_OF_GPT2 = {char: byte for byte, char in bytes_to_unicode().items()}

TRICKY = [
    "",
    "a",
    " ",
    "  ",
    "\n",
    "\n\n x",
    " leading and trailing ",
    "   three at the head",
    "Hello, how are you?",
    "Grüße aus Köln, naïve café",
    "日本語のテキスト。 你好，世界！",
    "🙂🚀👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪",
    "鿿鿿鿿é鿿 x 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ",
    "e\u0301 a\u0308o\u0302\u0323 \u0301alone",
    "def add(a, b):\n    return a + b\n\t\tx\r\n  \n end\n  ",
    "zero\u200bwidth\u00a0no-break\u3000wide\ufeff",
    "\x00\x01\x7f\x80 control",
    "a ▁ b▁▁c",
    "<|im_start|>user\nHi 🙂 <|im_end|>\n<|im_start|>assistant\n x日<|im_end|>\n",
    "<|user|><|im_end|><|im_end|> <|user|>  鿿<|user|>",
    "say <s> and </s> and <unk>.",
]
texts = st.lists(st.sampled_from([*TRICKY, *SPECIAL]) | st.text(max_size=12), max_size=6).map("".join)


def ends_by_vocabulary(tokenizer: PreTrainedTokenizerFast, kind: str, ids: Sequence[int], text: str) -> list[int]:
    """The ends, by laying the bytes that each id stands for along the text; fails where they do not fit.

    The tokenizers differ in the space they put before a text: byte-level BPE puts none; SentencePiece's BPE one
    before the text and after each special token; our Unigram one before a text that does not begin with one.
    """
    raw, added = text.encode(), tokenizer.get_added_vocab()
    ends: list[int] = []
    position, head = 0, kind == "sentencepiece_bpe" or (kind == "unigram" and not text.startswith((" ", "▁")))
    for name in tokenizer.convert_ids_to_tokens(list(ids)):
        if name in added:
            pieces = [name.encode()]
        elif kind == "byte_level_bpe":
            pieces = [bytes(BYTES_OF_GPT2[char] for char in name)]
        elif name.startswith("<0x"):
            pieces = [bytes.fromhex(name[3:5])]
        else:
            pieces = [char.encode() for char in (name[1:] if head and name[0] == "▁" else name)]
        for piece in pieces:
            space = piece.replace("▁".encode(), b" ")
            found = piece if raw.startswith(piece, position) else space
            assert raw.startswith(found, position), (name, position)
            position += len(found)
        ends.append(position)
        head = name in added and kind == "sentencepiece_bpe"
    assert position == len(raw)
    return ends


def check_ends(kind: str, special: tuple[str, ...], text: str) -> None:
    tokenizer = shared(kind, special)
    (tokens,) = TextTokenizer(tokenizer, kind).encode([text])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert tokens.ids.tolist() == [*before, *ids]
    assert tokens.ends.tolist() == [*(0 for _ in before), *ends_by_vocabulary(tokenizer, kind, ids, text)]
    assert tokens.ids.dtype == tokens.ends.dtype == np.int32


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_ends_where_its_bytes_end(kind: str, special: tuple[str, ...]) -> None:
    for text in TRICKY:
        check_ends(kind, special, text)


@property_test
@given(st.sampled_from(KINDS), st.sampled_from([(), SPECIAL]), texts)
def test_a_token_ends_where_its_bytes_end_in_any_text(kind: str, special: tuple[str, ...], text: str) -> None:
    check_ends(kind, special, text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_been_read_decodes_to_the_head_of_the_text(kind: str) -> None:
    """Incremental decoding, the other oracle: at every end that lies between two characters."""
    tokenizer, text = shared(kind), "naïve 鿿鿿 🙂🚀 Hello,  you\nand 日本語 again"
    (tokens,) = TextTokenizer(tokenizer, kind).encode([text])
    checked = 0
    for number, end in enumerate(tokens.ends.tolist(), 1):
        head = text.encode()[:end].decode(errors="ignore")
        if len(head.encode()) == end:
            decoded = tokenizer.decode(tokens.ids[:number].tolist(), skip_special_tokens=True)
            assert decoded in (head, f" {head}")
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_character_split_over_tokens_ends_by_itself(kind: str) -> None:
    unseen = "ꙮ𝔘"  # in no vocabulary: three bytes and four
    (tokens,) = TextTokenizer(shared(kind), kind).encode([f"a{unseen * 3}"])
    assert set(range(1, 23)) <= set(tokens.ends.tolist())


@pytest.mark.parametrize("trim", [False, True], ids=["kept", "trimmed"])
@pytest.mark.parametrize("prefix", [False, True])
def test_offsets_that_leave_out_white_space_do_not_move_the_ends(trim: bool, prefix: bool) -> None:
    """GPT-NeoX, MPT and RoBERTa trim offsets: of a line break and its indentation only the break remains."""
    tokenizer = train("byte_level_bpe", ["def f(a):\n    return a\n    x\n        y\n    return b\n  \n  c"] * 5)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    for text in ["def f(a):\n    return b\n  x  ", "  \n  return", " leading", "a \n\n  b\n    "]:
        (tokens,) = TextTokenizer(tokenizer, "neox").encode([text])
        expected = ends_by_vocabulary(tokenizer, "byte_level_bpe", tokens.ids.tolist(), text)
        assert tokens.ends.tolist() == expected
    names = tokenizer.convert_ids_to_tokens(tokenizer("f():\n    return").input_ids)
    assert any(name.startswith("ĊĠ") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_one_batch_are_tokenised_as_each_alone(kind: str) -> None:
    tokenizer = TextTokenizer(shared(kind, SPECIAL), kind)
    for text, tokens in zip(TRICKY, tokenizer.encode(TRICKY), strict=True):
        (alone,) = tokenizer.encode([text])
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.ends.tolist() == alone.ends.tolist()
    assert tokenizer.encode([]) == []


NORMALIZERS = {
    "NFKC": normalizers.NFKC(),
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "lower case": normalizers.Lowercase(),
    "strip": normalizers.Strip(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_rewrites_the_text_never_ends_beyond_it(kind: str, name: str) -> None:
    tokenizer = train(kind)
    tokenizer.backend_tokenizer.normalizer = NORMALIZERS[name]
    odd = [
        "ﬁne ½ ｆｕｌｌ e\u0301 é ㍿ İstanbul",
        "가각힣 각",
        "ﷺ",
        "e\u0301" * 5,
        " \u0301",
        "鿿e\u0301鿿\u0301",
        " ½ ",
    ]
    for text in [*TRICKY, *odd]:
        (tokens,) = TextTokenizer(tokenizer, kind).encode([text])
        ends = tokens.ends.tolist()
        assert ends == sorted(ends)
        assert all(0 <= end <= len(text.encode()) for end in ends)


@pytest.mark.parametrize("name", ["NFKC", "NFC", "NFD", "lower case", "accents"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_rewritten_character_still_ends_at_its_own_bytes(kind: str, name: str) -> None:
    tokenizer = train(kind)
    tokenizer.backend_tokenizer.normalizer = NORMALIZERS[name]
    text_tokenizer = TextTokenizer(tokenizer, kind)
    head, tail = "ﬁ e\u0301 ㍿ é", " the quick brown 🙂 fox"
    (whole,), (last,) = text_tokenizer.encode([head + tail]), text_tokenizer.encode(["a" + tail])
    count = len(tokenizer.tokenize(" brown 🙂 fox")) - 1
    assert whole.ids[-count:].tolist() == last.ids[-count:].tolist()
    shift = len(head.encode()) - len("a")
    assert whole.ends[-count:].tolist() == (last.ends[-count:] + shift).tolist()


rewritten = st.lists(st.sampled_from(REWRITTEN), max_size=8).map("".join)


@cache
def rewriting(name: str, of_bytes: bool) -> TextTokenizer:
    return rewriting_tokenizer(name, of_bytes)


def heads_read(reader: TextTokenizer, name: str, tokens: Tokens, text: str) -> list[bytes]:
    """What has been read after each token, what is put before the text left out."""
    spelt = list(accumulate(reader.surfaces[token] for token in tokens.ids.tolist()))
    whole = REWRITINGS[name].in_python(text)
    before = len(spelt[-1]) - len(whole.encode()) if spelt else 0
    assert before in (0, 1)
    return [head[before:] for head in spelt]


def check_rewritten(name: str, of_bytes: bool, text: str) -> int:
    """The oracle rewrites every head of the text by itself, in Python. How many positions stand for one.

    A position that is the last with its end has read what that head of the text is rewritten to, as a whole text
    or as one that goes on. Every head that can be rewritten apart from the rest, and after which a token ends, is
    some position's.
    """
    reader, in_python = rewriting(name, of_bytes), REWRITINGS[name].in_python
    (tokens,) = reader.encode([text])
    ends = tokens.ends.tolist()
    assert ends == sorted(ends)
    heads = heads_read(reader, name, tokens, text)
    last = {end: position for position, end in enumerate(ends)}
    raw, whole = text.encode(), in_python(text)
    for end, position in last.items():
        begun = raw[:end].decode(errors="ignore")
        as_a_text, going_on = in_python(begun), in_python(begun + "x").removesuffix("x")
        piece = raw[len(begun.encode()) : end]
        assert heads[position] in (as_a_text.encode() + piece, going_on.encode() + piece), (text, end)
    found = {
        in_python(raw[:end].decode()) for end in last if raw[:end].decode(errors="ignore").encode() == raw[:end]
    }
    for place in range(1, len(text) + 1):
        head = in_python(text[:place])
        if head + in_python(text[place:]) == whole and head.encode() in heads:
            assert head in found, (text, place)
    return len(last)


BOTH = [(name, of_bytes) for name in REWRITINGS for of_bytes in (True, False)]
BOTH.remove(("put before", True))  # only SentencePiece's kind puts something before a text in this way


@pytest.mark.slow
@pytest.mark.parametrize(("name", "of_bytes"), BOTH)
def test_a_position_stands_for_a_head_of_the_text_only_if_it_has_read_what_that_is_rewritten_to(
    name: str, of_bytes: bool
) -> None:
    rng = random.Random(3)
    some = [*REWRITTEN, *("".join(rng.choices(REWRITTEN, k=rng.randint(2, 9))) for _ in range(600))]
    assert sum(check_rewritten(name, of_bytes, text) for text in some) > 3 * len(some)


@pytest.mark.slow
@property_test
@given(st.sampled_from(BOTH), rewritten)
def test_a_position_stands_for_a_head_of_any_text_only_if_it_has_read_it(
    both: tuple[str, bool], text: str
) -> None:
    check_rewritten(*both, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bos_ends_at_byte_0_and_no_eos_is_added(kind: str) -> None:
    tokenizer = copy.deepcopy(train(kind))
    bos = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} {bos} $A {tokenizer.eos_token}",
        special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in {bos, tokenizer.eos_token}],
    )
    text_tokenizer = TextTokenizer(tokenizer, kind)
    assert text_tokenizer.prefix == [tokenizer.convert_tokens_to_ids(bos)] * 2
    for text in ("Hello you", ""):
        (tokens,) = text_tokenizer.encode([text])
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert tokens.ids.tolist() == [*text_tokenizer.prefix, *plain]
        assert tokens.ends[:2].tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_an_id_are_those_the_tokenizer_decodes(kind: str) -> None:
    tokenizer = shared(kind, SPECIAL)
    surfaces = TextTokenizer(tokenizer, kind).surfaces
    assert set(surfaces) == set(tokenizer.get_vocab().values())
    first = tokenizer.convert_tokens_to_ids("<|user|>")  # so that the decoder has no head to strip
    for token, surface in surfaces.items():
        if not tokenizer.convert_ids_to_tokens(token).startswith("<0x"):
            decoded = tokenizer.decode([first, token], clean_up_tokenization_spaces=False)
            assert decoded == "<|user|>" + surface.decode(errors="replace")
    if kind != "byte_level_bpe":
        names = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        assert [surfaces[token] for token in names] == [bytes([byte]) for byte in range(256)]


def test_bytes_that_a_vocabulary_lacks_are_passed_over() -> None:
    """As SmolLM2's lacks some of no printable character. The tokenizer's own offsets are those of "ab" here."""
    reader = byte_level(["a", "b", "ab", "c"])
    (tokens,) = reader.encode(["x\x07a\x16bxx"])
    assert [reader.surfaces[token] for token in tokens.ids.tolist()] == [b"ab"]
    assert tokens.ends.tolist() == [5]
    (tokens,) = reader.encode(["\x16cx\x07\x07ab\x16c"])
    assert tokens.ends.tolist() == [2, 7, 9]


def test_a_tokenizer_that_does_not_tell_what_its_tokens_cover_is_refused() -> None:
    with pytest.raises(UserError, match=r"the tokenizer of org/model \(ByT5Tokenizer\) does not report which"):
        TextTokenizer(ByT5Tokenizer(), "org/model")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer of org/model could be loaded"):
        load_tokenizer(tmp_path, "org/model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_reads_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = shared(kind, SPECIAL)
    tokenizer.save_pretrained(tmp_path)
    before, loaded = TextTokenizer(tokenizer, kind), load_tokenizer(tmp_path, kind)
    assert loaded.sha256 == before.sha256
    assert loaded.prefix == before.prefix
    for one, other in zip(loaded.encode(TRICKY), before.encode(TRICKY), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.ends.tolist() == other.ends.tolist()


def test_tokenizers_that_do_something_else_have_another_fingerprint() -> None:
    hashes = {TextTokenizer(shared(kind, special), "").sha256 for kind in KINDS for special in [(), SPECIAL]}
    assert len(hashes) == 6
    tokenizer = train("unigram")
    text_tokenizer = TextTokenizer(tokenizer, "")
    before = text_tokenizer.sha256
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert text_tokenizer.sha256 == before
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert TextTokenizer(tokenizer, "").sha256 != before


def test_a_tokenizer_set_to_truncate_still_reads_whole_texts() -> None:
    tokenizer = train("unigram")
    text = "The quick brown fox jumps over the lazy dog."
    whole = TextTokenizer(tokenizer, "").encode([text])[0].ids.tolist()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert TextTokenizer(tokenizer, "").encode([text])[0].ids.tolist() == whole


def test_a_tokenizer_of_two_merged_decoders_is_read_by_its_decoder_not_its_name() -> None:
    """Llama 3 and Qwen2 share a byte-level decoder although their pre-tokenizers are sequences."""
    tokenizer = train("byte_level_bpe")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert "ByteLevel" in json.loads(backend.to_str())["decoder"]["decoders"][0]["type"]
    text = "In 2024: 鿿 🙂 12345"
    (tokens,) = TextTokenizer(tokenizer, "").encode([text])
    expected = ends_by_vocabulary(tokenizer, "byte_level_bpe", tokens.ids.tolist(), text)
    assert tokens.ends.tolist() == expected


def spans_of(cuts: Sequence[int]) -> list[tuple[int, int]]:
    ordered = sorted(set(cuts))
    return list(zip(ordered[::2], ordered[1::2], strict=False))


@property_test
@given(
    st.sets(st.integers(1, 60)).map(sorted),
    st.lists(st.integers(0, 60)).map(spans_of),
    st.booleans(),
)
def test_a_position_is_supervised_if_the_next_token_ends_inside_a_span(
    ends: list[int], spans: list[tuple[int, int]], bos: bool
) -> None:
    ends = [0, *ends] if bos else ends
    tokens = Tokens(np.zeros(len(ends), np.int32), np.array(ends, np.int32))
    expected = [
        position
        for position in range(len(ends) - 1)
        if any(start < ends[position + 1] <= stop for start, stop in spans)
    ]
    found = supervised_positions(tokens, spans)
    assert found.tolist() == expected
    assert found.dtype == np.int32


def test_a_token_that_reads_nothing_after_the_end_of_a_span_is_not_supervised() -> None:
    """SentencePiece puts a space, of no byte of the text, behind every special token."""
    tokens = Tokens(np.arange(7, dtype=np.int32), np.array([0, 0, 3, 3, 6, 6, 7], np.int32))
    assert supervised_positions(tokens, [(0, 6)]).tolist() == [1, 2, 3]  # 3 → 3 within the span is
    assert supervised_positions(tokens, [(3, 6)]).tolist() == [3]
    assert supervised_positions(tokens, [(0, 3), (6, 7)]).tolist() == [1, 5]


def test_the_first_token_of_a_text_is_predicted_only_after_a_bos() -> None:
    ids = np.zeros(2, np.int32)
    assert supervised_positions(Tokens(ids, np.array([1, 2], np.int32)), [(0, 2)]).tolist() == [0]
    assert supervised_positions(Tokens(ids, np.array([0, 2], np.int32)), [(0, 2)]).tolist() == [0]
    assert supervised_positions(Tokens(ids[:1], np.array([2], np.int32)), [(0, 2)]).tolist() == []
    assert supervised_positions(Tokens(ids, np.array([0, 2], np.int32)), []).tolist() == []


def test_a_bos_that_only_the_chat_template_writes_is_put_before_every_text() -> None:
    tokenizer = copy.deepcopy(shared("byte_level_bpe", ()))
    assert TextTokenizer(tokenizer, "plain").prefix == []
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    reader = TextTokenizer(tokenizer, "templated")
    assert reader.prefix == [tokenizer.bos_token_id]
    (tokens,) = reader.encode(["ab"])
    assert tokens.ids[0] == tokenizer.bos_token_id
    assert tokens.ends[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_begins_with_bos_gets_no_other(kind: str) -> None:
    """It ends at its own bytes, wherever else the text names it."""
    tokenizer = copy.deepcopy(shared(kind, ()))
    bos = tokenizer.bos_token or "<|endoftext|>"
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    reader = TextTokenizer(tokenizer, kind)
    (own,) = (reader.prefix,)
    written, plain = reader.encode([f"{bos}Hello {bos}you", "Hello you"])
    assert written.ids[0] == plain.ids[0] == own[0] == tokenizer.bos_token_id
    assert written.ids.tolist().count(own[0]) == 2
    assert (written.ends[0], plain.ends[0]) == (len(bos), 0)
    assert written.ends[-1] == len(f"{bos}Hello {bos}you")


@pytest.mark.parametrize(
    ("settings_", "adds", "expected"),
    [
        ({"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, False, True),
        ({"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}, False, True),
        ({"add_bos_token": True}, True, True),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, True, False),
        ({"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}, True, True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True, True),
        ({}, False, False),
    ],
)
def test_a_tokenizer_config_decides_whether_bos_is_added(
    settings_: dict[str, object], adds: bool, expected: bool, tmp_path: Path
) -> None:
    """And what is saved of it, without ``add_bos_token``, does the same."""
    tokenizer = copy.deepcopy(shared("byte_level_bpe", ()))
    tokenizer.bos_token = bos = "<|endoftext|>"
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(tmp_path / "pivot")
    path = tmp_path / "pivot" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("tokenizer_class")
    path.write_text(json.dumps(config | settings_))
    reader = load_tokenizer(tmp_path / "pivot", "pivot")
    assert reader.prefix == ([tokenizer.bos_token_id] if expected else [])
    reader.tokenizer.save_pretrained(tmp_path / "target")
    target = load_tokenizer(tmp_path / "target", "target")
    assert (target.prefix, target.sha256) == (reader.prefix, reader.sha256)


def test_added_tokens_of_white_space_are_text() -> None:
    """Gemma's runs of spaces: added tokens named "▁▁", which both spaces and "▁▁" itself are read as."""
    reader = tokenizer_zoo.sentencepiece(["a", "b", " ", "  ", "   "])
    reader.tokenizer.add_tokens([AddedToken(run, normalized=False) for run in ("▁▁", "▁▁▁", "\n\n")])
    gemma = TextTokenizer(reader.tokenizer, "gemma")
    named = gemma.tokenizer.get_vocab()
    assert [gemma.surfaces[named[run]] for run in ("▁▁", "▁▁▁", "\n\n")] == [b"  ", b"   ", b"\n\n"]
    assert not gemma.marks.keys() & {named["▁▁"], named["\n\n"]}
    (tokens,) = gemma.encode(["a   b\n\na▁▁b"])
    assert tokens.ids.tolist() == [named[name] for name in ("a", "▁▁▁", "b", "\n\n", "a", "▁▁", "b")]
    assert tokens.ends.tolist() == [1, 4, 5, 7, 8, 14, 15]


def test_the_name_of_an_added_token_is_what_stands_in_a_text() -> None:
    """Byte-level decoding takes its letters for bytes, "é" for 0xE9: a text has the letters."""
    tokenizer = copy.deepcopy(shared("byte_level_bpe", ()))
    tokenizer.add_tokens([AddedToken("<é>", normalized=False)])
    reader = TextTokenizer(tokenizer, "")
    (token,) = reader.encode(["<é>"])[0].ids.tolist()
    assert reader.surfaces[token] == "<é>".encode()
    assert tokenizer.decode([token]) == "<\ufffd>"


def test_where_a_token_is_unknown_none_ends_inside_what_is_rewritten() -> None:
    """There the ends are the tokenizer's own, and it says that "ｶﾞ" is read after "ｶ"."""
    backend = tokenizer_zoo.sentencepiece(["a", "b", "M", "T", "My", "ガ"]).tokenizer
    backend.backend_tokenizer.normalizer = normalizers.NFKC()
    reader = TextTokenizer(backend, "unknown")
    for text, ends in (("ꙮaｶﾞb", [3, 4, 11, 11]), ("ꙮaｶﾞ", [3, 4, 10]), ("ꙮa™y", [3, 4, 8, 8])):
        (tokens,) = reader.encode([text])
        assert backend.unk_token_id == tokens.ids[0]
        assert tokens.ends.tolist() == ends


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_that_takes_white_space_with_it_has_read_that_too(kind: str) -> None:
    tokenizer = copy.deepcopy(shared(kind, ()))
    tokenizer.add_tokens(
        [
            AddedToken("<|left|>", lstrip=True, normalized=False),
            AddedToken("<|right|>", rstrip=True, normalized=False),
        ]
    )
    left, right = tokenizer.convert_tokens_to_ids(["<|left|>", "<|right|>"])
    text = "e\u0301 日 \n<|left|> x 🙂<|right|>\n  日本 e\u0301"
    (tokens,) = TextTokenizer(tokenizer, kind).encode([text])
    ends = dict(zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True))
    assert ends[left] == len("e\u0301 日 \n<|left|>".encode())
    assert ends[right] == len("e\u0301 日 \n<|left|> x 🙂<|right|>\n  ".encode())
    assert tokens.ends[-1] == len(text.encode())
    before = int(tokens.ends[tokens.ids.tolist().index(left) - 1])
    assert before == len("e\u0301 日".encode())


def test_a_relative_path_is_read_from_the_folder_that_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for name, size in (("one", 300), ("other", 400)):
        train("byte_level_bpe", size=size).save_pretrained(tmp_path / name / "pivot")
        monkeypatch.chdir(tmp_path / name)
        sizes.append(len(load_tokenizer(Path("pivot"), "the pivot").surfaces))
    assert sizes[0] != sizes[1]
