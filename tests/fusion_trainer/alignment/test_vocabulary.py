"""Which ids of the pivot an id of the source stands for: small vocabularies by hand, others by brute force."""

import math
import random
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers
import tokenizer_zoo
from scipy.sparse import csr_array
from test_positions import edits
from tokenizer_zoo import MAKERS, Kind, byte_level, kind, sentencepiece
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fusion_trainer.alignment import vocabulary
from fusion_trainer.alignment.co_occurrence import Neighbours, co_occurrence, count_neighbours
from fusion_trainer.alignment.coverage import coverage
from fusion_trainer.alignment.pair_counts import Corpus, count, load_counts, save_counts
from fusion_trainer.alignment.positions import CONTAINED
from fusion_trainer.alignment.saved_map import Places, build_map, load_map, saved_map
from fusion_trainer.alignment.vocabulary import METHODS, Ends, Vocabularies, VocabularyMap
from fusion_trainer.data.answers import whole_text
from fusion_trainer.data.blocks import Block
from fusion_trainer.data.readers import DIALOGUES, Reader
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.errors import UserError
from varm_common.saved_arrays import load_arrays

Images = dict[int, dict[int, float]]
NO_ENDS = Ends()
PLACES: Places = {"source": ("org/source", "abc"), "pivot": ("org/pivot", None)}
TWO_OF_A_KIND = [
    ("gpt2", "llama"),
    ("llama", "gpt2"),
    ("unigram", "qwen2"),
    ("gpt2", "unigram"),
    ("gemma", "roberta"),
]


def images(made: VocabularyMap | csr_array) -> Images:
    """Id → {image: weight}, of the ids that have any."""
    matrix = csr_array(made.matrix if isinstance(made, VocabularyMap) else made)
    rows = {}
    for token in range(matrix.shape[0]):
        here = slice(matrix.indptr[token], matrix.indptr[token + 1])
        rows[token] = dict(zip(matrix.indices[here].tolist(), matrix.data[here].tolist(), strict=True))
    return {token: row for token, row in rows.items() if row}


def ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """Written with spaces as spaces → id."""
    return {surface.decode(errors="surrogateescape"): token for token, surface in tokenizer.surfaces.items()}


def by_words(made: VocabularyMap, source: TextTokenizer, pivot: TextTokenizer) -> dict[str, str]:
    """A one-to-one map in words."""
    assert all(list(row.values()) == [1.0] for row in images(made).values())
    ours, theirs = source.surfaces, pivot.surfaces
    return {ours[token].decode(): theirs[next(iter(row))].decode() for token, row in images(made).items()}


LETTERS = [" ", "a", "d", "e", "h", "n", "o", "r", "t"]
SOURCE_WORDS = [*LETTERS, "\n", "th", "the", " the", "an", "and", " and", "or", "then", "en", "hen"]
PIVOT_WORDS = [*LETTERS, "<0x0A>", " the", " an", "the", "her", "on"]
IN_BOTH = [*LETTERS, "\n", "the", " the"]


@pytest.fixture(scope="module")
def small() -> tuple[TextTokenizer, TextTokenizer]:
    """A byte-level source, and a pivot of SentencePiece's kind with other words."""
    return byte_level(SOURCE_WORDS), sentencepiece(PIVOT_WORDS, fallback=True)


# By hand


def test_exact_maps_the_same_bytes_however_spaces_are_written(small: tuple[TextTokenizer, TextTokenizer]) -> None:
    """ "Ġthe" and "▁the" are one, as are a line break and the byte 0A."""
    source, pivot = small
    assert {"Ġthe", "Ċ"} < source.tokenizer.get_vocab().keys()
    assert {"▁the", "<0x0A>"} < pivot.tokenizer.get_vocab().keys()
    there = by_words(vocabulary.exact(Vocabularies(source, pivot)), source, pivot)
    back = by_words(vocabulary.exact(Vocabularies(pivot, source)), pivot, source)
    assert there == back == {word: word for word in IN_BOTH}


def test_a_byte_to_fall_back_to_is_no_image_where_a_token_of_the_same_byte_is() -> None:
    source = byte_level(["a", "b"])
    pivot = sentencepiece(["<0x61>", "<0x62>", "a", "x"], fallback=True)
    made = images(vocabulary.exact(Vocabularies(source, pivot)))
    named = pivot.tokenizer.get_vocab()
    assert made == {ids(source)["a"]: {named["a"]: 1.0}, ids(source)["b"]: {named["<0x62>"]: 1.0}}
    back = images(vocabulary.exact(Vocabularies(pivot, source)))  # both of the pivot's "a" stand for the source's
    assert back[named["a"]] == back[named["<0x61>"]] == {ids(source)["a"]: 1.0}


def test_minimum_edit_distance_worked_by_hand(small: tuple[TextTokenizer, TextTokenizer]) -> None:
    source, pivot = small
    theirs = ids(pivot)
    exact = {word: word for word in IN_BOTH}
    assert by_words(vocabulary.min_edit_distance(Vocabularies(source, pivot)), source, pivot) == exact | {
        "then": " the",  # "the" is as near, and has the higher id
        "an": " an",  # without its space the same word
        "and": " an",
        " and": " an",
        "th": "h",  # as "t", "the" and " the"
        "or": "o",
        "en": "e",
        "hen": "her",
    }
    frequency = {theirs[word]: number for word, number in {"the": 7, " the": 6, "n": 3, "on": 9, "e": 9}.items()}
    assert by_words(
        vocabulary.min_edit_distance(Vocabularies(source, pivot), frequency), source, pivot
    ) == exact | {
        "then": "the",
        "an": " an",
        "and": " an",
        " and": " an",
        "th": "the",
        "or": "on",
        "en": "e",  # as frequent as "on", and of lower id
        "hen": "her",
    }


def test_of_equally_near_tokens_the_more_frequent_wins_and_then_the_lower_id() -> None:
    source = byte_level(["a", "b", "c", "ab"])
    pivot = sentencepiece(["ax", "ay", "az"])
    token, theirs = ids(source)["ab"], ids(pivot)
    nearest = {
        None: "ax",
        (("ay", 1),): "ay",
        (("ay", 2), ("az", 2)): "ay",
        (("ay", 2), ("az", 3)): "az",
        (("ax", 1), ("ay", 1), ("az", 1)): "ax",
    }
    for counts, word in nearest.items():
        frequency = {theirs[name]: number for name, number in counts or ()}
        assert images(vocabulary.min_edit_distance(Vocabularies(source, pivot), frequency))[token] == {
            theirs[word]: 1.0
        }


def test_prefix_worked_by_hand(small: tuple[TextTokenizer, TextTokenizer]) -> None:
    """What the pivot has to predict first: of "then" its "the", of " and" its " an"."""
    source, pivot = small
    exact = {word: word for word in IN_BOTH}
    there = {"th": "t", "an": "a", "and": "a", " and": " an", "or": "o", "then": "the", "en": "e", "hen": "h"}
    assert by_words(vocabulary.prefix(Vocabularies(source, pivot)), source, pivot) == exact | there
    back = by_words(vocabulary.prefix(Vocabularies(pivot, source)), pivot, source)
    assert {word: back[word] for word in (" an", "her", "on", *IN_BOTH)} == exact | {
        " an": " ",
        "her": "h",
        "on": "o",
    }


def test_prefix_is_read_within_a_text_and_not_at_its_beginning() -> None:
    """At a text's beginning Llama's tokenizer puts a space before "the"; within a text it reads no space there."""
    source, pivot = kind("gpt2"), kind("llama")
    made = images(vocabulary.prefix(Vocabularies(source.reader, pivot.reader)))
    for token, surface in source.text.items():
        (image,) = made[token]
        assert pivot.surfaces[image][:1] == surface[:1]


def test_where_readings_differ_the_pivots_own_token_wins_and_else_the_first() -> None:
    """A pivot that takes a digit at a line's head by itself and elsewhere two, though it knows three."""
    source = byte_level(["\n", "1", "2", "3", "12", "123"])
    pivot = byte_level(["\n", "a", "1", "2", "3", "12", "123"])
    backend = pivot.tokenizer.backend_tokenizer
    at_the_head = pre_tokenizers.Split(Regex(r"(?<=\n)\d|\d{1,2}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([at_the_head, backend.pre_tokenizer])
    heads = TextTokenizer(pivot.tokenizer, "heads of lines")
    words = ids(pivot)
    for text, spelt in (("\n12", ["\n", "1", "2"]), ("a123", ["a", "12", "3"])):
        assert heads.encode([text])[0].ids.tolist() == [words[word] for word in spelt]
    made = by_words(vocabulary.prefix(Vocabularies(source, heads)), source, heads)
    assert (made["12"], made["123"]) == ("12", "1")


def test_what_the_pivot_reads_as_unknown_has_no_image() -> None:
    pivot = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    pivot.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    reader = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=pivot, unk_token="<unk>"), "letters")
    source = byte_level(["a", "b"])
    assert images(vocabulary.prefix(Vocabularies(source, reader))) == {ids(source)["a"]: {1: 1.0}}


def test_a_token_of_part_of_a_character_goes_to_the_longest_token_it_begins_with() -> None:
    """ "\\xf0\\x9f" is no text; the pivot would predict its first byte."""
    smile = "🙂".encode()
    source = tokenizer_zoo.kind("gpt2").reader
    pivot = kind("llama").reader
    parts = [token for token, surface in source.surfaces.items() if surface == smile[:2]]
    made = images(vocabulary.prefix(Vocabularies(source, pivot)))
    named = pivot.tokenizer.get_vocab()
    assert len(parts) == 1
    assert made[parts[0]] == {named["<0xF0>"]: 1.0}


def test_statistics_worked_by_hand(small: tuple[TextTokenizer, TextTokenizer]) -> None:
    """One image is the pair of least distance over count; several are weighed by their counts."""
    source, pivot = small
    s, p = ids(source), ids(pivot)
    counts = np.zeros((max(s.values()) + 1, max(p.values()) + 1), np.int64)
    counts[s["then"], p["the"]], counts[s["then"], p["on"]], counts[s["then"], p["n"]] = 2, 9, 1
    counts[s["an"], p["on"]], counts[s["an"], p["n"]] = 4, 4  # distances 1 and 1: the lower id
    counts[s["a"], p["a"]], counts[s["a"], p["on"]] = 1, 50  # distance 0 is the least at any count
    counts[s["hen"], p["her"]], counts[s["hen"], p["h"]] = 1, 2  # 1/1 and 2/2: the more frequent
    one = images(vocabulary.statistics(Vocabularies(source, pivot), csr_array(counts)))
    assert one[s["then"]] == {p["on"]: 1.0}  # 3/9 < 1/2 < 3/1
    assert one[s["an"]] == {p["n"]: 1.0}
    assert one[s["a"]] == {p["a"]: 1.0}
    assert one[s["hen"]] == {p["h"]: 1.0}
    assert set(one) == {s["then"], s["an"], s["a"], s["hen"]}
    two = images(vocabulary.statistics(Vocabularies(source, pivot), csr_array(counts), most=2))
    assert two[s["then"]] == pytest.approx({p["on"]: 9 / 11, p["the"]: 2 / 11})
    assert two[s["an"]] == {p["n"]: 0.5, p["on"]: 0.5}
    all_of_them = images(vocabulary.statistics(Vocabularies(source, pivot), csr_array(counts), most=9))
    assert all_of_them[s["then"]] == pytest.approx({p["on"]: 9 / 12, p["the"]: 2 / 12, p["n"]: 1 / 12})


def test_statistics_as_published_worked_by_hand(small: tuple[TextTokenizer, TextTokenizer]) -> None:
    """Exact names first, else the least distance × σ(count), with a tenth where one contains the other."""
    source, pivot = small
    s, p = ids(source), ids(pivot)
    counts = np.zeros((max(s.values()) + 1, max(p.values()) + 1), np.int64)
    counts[s["then"], p["the"]], counts[s["then"], p["her"]], counts[s["then"], p["n"]] = 90, 1, 2
    counts[s["or"], p["on"]], counts[s["or"], p["t"]] = 2, 1  # 1 × 0.88 and 2 × 0.73
    counts[s["hen"], p["her"]], counts[s["hen"], p["on"]] = 9, 1  # 1 × 1.0 and 2 × 0.73
    counts[s["and"], p["her"]], counts[s["and"], p["on"]] = 1, 3  # 3 × 0.73 and 2 × 0.95
    counts[s["a"], p["on"]] = 7
    counts[s["en"], p["on"]], counts[s["en"], p["t"]] = 50, 50  # 1 and 2
    counts[s["an"], p["on"]], counts[s["an"], p["her"]] = 5, 1
    made = by_words(vocabulary.statistics_published(Vocabularies(source, pivot), csr_array(counts)), source, pivot)
    assert made == {
        **{word: word for word in IN_BOTH},  # "a" too, though it was paired with "on" alone
        "then": "the",  # 0.1 × 1.0, against 0.1 × 3 × 0.88 for "n"
        "or": "on",
        "hen": "her",
        "and": "on",
        "en": "on",
        "an": "on",
    }
    ours = by_words(vocabulary.statistics(Vocabularies(source, pivot), csr_array(counts)), source, pivot)
    assert ours["a"] == "on"


def test_the_published_statistics_take_a_pair_seen_once_for_nearer_than_one_seen_often() -> None:
    """Ours divides by the count where the release multiplies with a function that grows with it."""
    source, pivot = byte_level(["a", "b", "c", "ab"]), byte_level(["a", "x", "y", "ax", "ay"])
    token, theirs = ids(source)["ab"], ids(pivot)
    counts = np.zeros((4, 5), np.int64)
    counts[token, theirs["ax"]], counts[token, theirs["ay"]] = 900, 1
    table = csr_array(counts)
    assert images(vocabulary.statistics_published(Vocabularies(source, pivot), table))[token] == {
        theirs["ay"]: 1.0
    }
    assert images(vocabulary.statistics(Vocabularies(source, pivot), table))[token] == {theirs["ax"]: 1.0}


def test_of_equally_near_tokens_the_one_with_similar_neighbours_is_the_image() -> None:
    """ "ax" and "ay" are as near to "ab". The neighbours decide, and where there are none the frequency."""
    source, pivot = byte_level(["a", "b", "c", "d", "ab"]), sentencepiece(["c", "d", "x", "ax", "ay"])
    s, p = ids(source), ids(pivot)
    theirs = np.zeros((6, 6), np.int64)
    theirs[p["ax"], p["c"]], theirs[p["ax"], p["d"]], theirs[p["ay"], p["d"]] = 900, 100, 1
    theirs[p["ay"], p["x"]] = 9  # the image of none of the source's tokens
    for beside, most_frequent, expected in [
        ({"c": 1}, "ay", "ax"),
        ({"d": 7}, "ax", "ay"),
        ({"c": 1, "d": 1}, "ay", "ax"),  # cosines 0.78 and 0.71
        ({"c": 1, "d": 2}, "ax", "ay"),  # 0.54 and 0.89
        ({}, "ax", "ax"),
        ({}, "ay", "ay"),
    ]:
        ours = np.zeros((5, 5), np.int64)
        for word, number in beside.items():
            ours[s["ab"], s[word]] = number
        neighbours = Neighbours(csr_array(ours), csr_array(theirs))
        made = co_occurrence(Vocabularies(source, pivot), neighbours, {p[most_frequent]: 5})
        assert images(made)[s["ab"]] == {p[expected]: 1.0}, beside
        assert images(made)[s["c"]] == {p["c"]: 1.0}


# Tokens that are no text


def everything_paired(source: TextTokenizer, pivot: TextTokenizer) -> Corpus:
    """A corpus in which every token was paired with every other."""
    rows, columns = max(source.surfaces) + 1, max(pivot.surfaces) + 1
    return Corpus(csr_array(np.ones((rows, columns), np.int64)), np.ones(columns, np.int64))


def mapped(method: vocabulary.Method, source: TextTokenizer, pivot: TextTokenizer, ends: Ends = NO_ENDS) -> Images:
    """The map of a corpus in which every token was paired with every other."""
    corpus = everything_paired(source, pivot)
    sizes = corpus.pairs.shape
    neighbours = Neighbours(*(csr_array(np.ones((size, size), np.int64)) for size in sizes))
    return images(build_map(method, source, pivot, lambda: corpus, 0, ends, lambda: neighbours))


LIKE_SPECIAL = [*"<>eospad ", "<e", "<eo", "<eos", "<eos>", "<s", "<s>", " e", "os", " eos"]


@pytest.mark.parametrize("method", METHODS)
def test_a_special_token_is_mapped_by_its_function_and_is_the_image_of_no_text(method: vocabulary.Method) -> None:
    """The source's vocabulary has the pivot's special names as text, and the other way round."""
    source = byte_level(
        LIKE_SPECIAL,
        added=["<|x|>"],
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<fill>",
        unk_token="<huh>",
    )
    pivot = sentencepiece(
        [*"<>eospad ", "<end", "<begi", "eos", "seos"],
        added=["<|x|>", "<y>"],
        bos_token="<s>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    for one, other in ((source, pivot), (pivot, source)):
        made = mapped(method, one, other)
        special = {token: row for token, row in made.items() if token in one.special}
        assert special == {
            one.tokenizer.bos_token_id: {other.tokenizer.bos_token_id: 1.0},
            one.tokenizer.eos_token_id: {other.tokenizer.eos_token_id: 1.0},
            one.tokenizer.pad_token_id: {other.tokenizer.pad_token_id: 1.0},
        }
        assert (
            not {image for token, row in made.items() if token not in one.special for image in row} & other.special
        )
    if method != "exact":
        text = {ids(source)[word] for word in ("<s>", "<eos>", " eos")}
        assert text <= mapped(method, source, pivot).keys()


@pytest.mark.parametrize("method", METHODS)
def test_all_that_ends_a_turn_of_the_source_is_mapped_to_the_pivots_end(method: vocabulary.Method) -> None:
    """Whatever these tokens are: special, added, or of the vocabulary itself."""
    source = byte_level(["a", "b", "c", "ab"], added=["<|eot|>", "<|eom|>"], bos_token="<s>", eos_token="<|end|>")
    source.tokenizer.add_tokens(["[stop]"])
    pivot = sentencepiece(["a", "b", "[", "stop"], added=["<|im_end|>"], bos_token="<s>", eos_token="</s>")
    s, p = ids(source), ids(pivot)
    closing = tuple(s[word] for word in ("<|eot|>", "[stop]", "c"))
    made = mapped(method, source, pivot, Ends(closing, p["<|im_end|>"]))
    assert {token for token, row in made.items() if p["<|im_end|>"] in row} == {*closing}
    assert all(made[token] == {p["<|im_end|>"]: 1.0} for token in closing)
    assert s["<|end|>"] not in made  # its EOS ends no turn here
    assert made[s["<s>"]] == {p["<s>"]: 1.0}
    by_default = mapped(method, source, pivot)
    assert by_default[s["<|end|>"]] == {p["</s>"]: 1.0}
    assert s["<|eot|>"] not in by_default


@pytest.mark.parametrize("method", METHODS)
def test_a_pivot_whose_end_also_begins_and_pads_gets_the_ends_alone(method: vocabulary.Method) -> None:
    source = byte_level(["a", "b"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    pivot = byte_level(["a", "c"], **names)
    made = mapped(method, source, pivot)
    assert {token for token in made if token in source.special} == {ids(source)["</s>"]}
    back = mapped(method, pivot, source)
    assert back[ids(pivot)["<|endoftext|>"]] == {ids(source)["</s>"]: 1.0}
    without = byte_level(["a", "c"])
    assert not mapped(method, source, without).keys() & source.special


@pytest.mark.parametrize("method", METHODS)
def test_an_added_token_that_is_not_special_is_mapped_by_its_bytes_or_not_at_all(
    method: vocabulary.Method,
) -> None:
    """White space that was added is text: it may stand for what it resembles, as "ab" for "a"."""
    words = ["a", "b", "\n", "<", ">", "<b", "<b>"]
    source, pivot = byte_level([*words, "ab", "ab>", "aab>"]), byte_level([*words, "\n\n"])
    source.tokenizer.add_tokens(["<a>", "<ab>", "\n\n\n"])
    pivot.tokenizer.add_tokens(["<a>", "<aab>", "</b>"])
    s, p = ids(source), ids(pivot)
    made = mapped(method, source, pivot)
    assert made[s["<a>"]] == {p["<a>"]: 1.0}
    assert s["<ab>"] not in made
    marks = {p[word] for word in ("<a>", "<aab>", "</b>")}
    assert {token for token, row in made.items() if row.keys() & marks} == {s["<a>"]}
    assert (s["\n\n\n"] in made) == (method != "exact")
    back = mapped(method, pivot, source)
    assert back[p["<a>"]] == {s["<a>"]: 1.0}
    assert not back.keys() & {p["<aab>"], p["</b>"]}


@pytest.mark.parametrize("method", METHODS)
def test_identical_tokenizers_map_every_id_to_itself_but_for_other_ends(method: vocabulary.Method) -> None:
    one, again = (byte_level(["a", "b", "ab"], added=["<|eot|>", "<x>"], eos_token="</s>") for _ in range(2))
    named = ids(one)
    itself = {token: {token: 1.0} for token in one.surfaces}
    assert mapped(method, one, again) == itself
    assert mapped(method, one, again, Ends((named["</s>"],), named["</s>"])) == itself
    both = Ends((named["</s>"], named["<|eot|>"]), named["<|eot|>"])
    assert mapped(method, one, again, both) == itself | {named["</s>"]: {named["<|eot|>"]: 1.0}}


@pytest.mark.parametrize("method", ["exact", "prefix"])
def test_tokenizers_that_share_special_tokens_alone_have_no_map(method: vocabulary.Method) -> None:
    source = byte_level(["a", "b"], bos_token="<s>", eos_token="</s>")
    pivot = sentencepiece(["x", "y"], bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match=f"the map `{method}` maps no token of byte-level"):
        mapped(method, source, pivot)


# By brute force, over every pair of tokens


def word_of(one: Kind, token: int) -> str:
    return one.surfaces[token].decode(errors="surrogateescape").replace(" ", "")


def is_fallback(one: Kind, token: int) -> bool:
    name = one.tokenizer.convert_ids_to_tokens(token)
    return len(name) == 6 and name.startswith("<0x") and one.surfaces[token] != name.encode()


def by_function(source: str, pivot: str) -> dict[int, int]:
    """BOS to BOS and EOS to EOS, where both have them; what pads is EOS in all of these."""
    ours, theirs = kind(source).tokenizer, kind(pivot).tokenizer
    ids = [(ours.bos_token_id, theirs.bos_token_id), (ours.eos_token_id, theirs.eos_token_id)]
    return {one: other for one, other in ids if None not in (one, other)}


@cache
def exact_by_brute_force(source: str, pivot: str) -> dict[int, int]:
    """Of what is text."""
    ours, theirs = kind(source), kind(pivot)
    found = {}
    for token, surface in ours.text.items():
        same = [other for other, its in theirs.text.items() if its == surface]
        if same:
            found[token] = min(same, key=lambda other: (is_fallback(theirs, other), other))
    return found


@pytest.mark.parametrize(("source", "pivot"), TWO_OF_A_KIND)
def test_exact_is_what_comparing_every_pair_gives(source: str, pivot: str) -> None:
    made = vocabulary.exact(Vocabularies(kind(source).reader, kind(pivot).reader))
    expected = exact_by_brute_force(source, pivot) | by_function(source, pivot)
    assert images(made) == {token: {image: 1.0} for token, image in expected.items()}
    assert len(expected) > 100


@pytest.mark.parametrize("counted", [False, True], ids=["ids", "frequencies"])
@pytest.mark.parametrize(("source", "pivot"), [("gpt2", "llama"), ("gpt2", "unigram")])
def test_minimum_edit_distance_is_what_comparing_every_pair_gives(source: str, pivot: str, counted: bool) -> None:
    ours, theirs = kind(source), kind(pivot)
    rng = random.Random(3)
    frequency = {token: rng.randint(0, 2) for token in theirs.surfaces} if counted else {}
    made = images(vocabulary.min_edit_distance(Vocabularies(ours.reader, theirs.reader), frequency))
    exact = exact_by_brute_force(source, pivot)
    special = by_function(source, pivot)
    assert made.keys() == ours.text.keys() | special
    assert {token: made[token] for token in special} == {token: {image: 1.0} for token, image in special.items()}
    words = {token: word_of(theirs, token) for token in theirs.text}
    rest = [token for token in ours.text if token not in exact]
    for token in [*exact, *rng.sample(rest, min(len(rest), 120))]:
        best = exact.get(token)
        if best is None:
            word = word_of(ours, token)
            best = min(words, key=lambda t: (edits(word, words[t]), -frequency.get(t, 0), t))
        assert made[token] == {best: 1.0}, (ours.surfaces[token], theirs.surfaces[best])
    assert len(rest) > 10


@pytest.mark.parametrize(("source", "pivot"), TWO_OF_A_KIND)
def test_prefix_goes_to_a_token_the_text_begins_with_and_the_pivot_reads_it_so(source: str, pivot: str) -> None:
    """In some text the pivot's tokens, laid along it, break before the token's text and go on with its image.

    The pivot's token of the same bytes is the image where any text reads so, or none breaks there.
    """
    ours, theirs = kind(source), kind(pivot)
    made = images(vocabulary.prefix(Vocabularies(ours.reader, theirs.reader)))
    exact = exact_by_brute_force(source, pivot)
    heads = ["\n", "a", " ", ".", "0", "("]
    checked = never_read = 0
    special = by_function(source, pivot)
    assert made.keys() - ours.text.keys() == special.keys()
    assert {token: made[token] for token in special} == {token: {image: 1.0} for token, image in special.items()}
    for token, surface in ours.text.items():
        same = exact.get(token)
        (image,) = made[token]
        assert surface.startswith(theirs.surfaces[image])
        assert theirs.surfaces[image]
        try:
            text = surface.decode()
        except UnicodeDecodeError:
            assert same in (None, image)
            continue
        firsts = [first for head in heads if (first := first_token_after(theirs, head, text)) is not None]
        if same is None:
            assert image in firsts or not firsts
        else:
            assert image == (same if same in firsts or not firsts else firsts[0])
            never_read += image != same
        checked += 1
    assert checked >= 10
    assert (never_read > 0) == ((source, pivot) in {("unigram", "qwen2"), ("gpt2", "unigram")})


def test_a_token_the_pivot_knows_but_never_reads_is_no_image() -> None:
    """A pivot that takes digits one by one predicts "1" for "12"."""
    source = byte_level(["\n", "1", "2", "12", "a"], added=["<|end|>", "<|turn|>", "a12"])
    digits = byte_level(["\n", "1", "2", "12", "a"], added=["<|turn|>", "<|end|>"])
    assert by_words(vocabulary.prefix(Vocabularies(source, digits)), source, digits)["12"] == "12"
    backend = digits.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    one_by_one = TextTokenizer(digits.tokenizer, "one by one")
    assert ids(one_by_one)["12"] == ids(digits)["12"]
    assert by_words(vocabulary.prefix(Vocabularies(source, one_by_one)), source, one_by_one) == {
        "\n": "\n",
        "1": "1",
        "2": "2",
        "12": "1",
        "a": "a",
    }
    assert by_words(vocabulary.exact(Vocabularies(source, one_by_one)), source, one_by_one)["12"] == "12"


def first_token_after(one: Kind, head: str, text: str) -> int | None:
    (tokens,) = one.reader.encode([head + text])
    ends = one.truth(tokens, head + text) if one.normalize is None else tokens.ends.tolist()
    last = {end: position for position, end in enumerate(ends)}
    position = last.get(len(head.encode()))
    return None if position is None else int(tokens.ids[position + 1])


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize(("source", "pivot"), TWO_OF_A_KIND)
def test_statistics_are_what_a_table_of_counts_gives(source: str, pivot: str, most: int) -> None:
    """Counted pair by pair in a dictionary, from the truth of where tokens end."""
    ours, theirs = kind(source), kind(pivot)
    some = [text for text in tokenizer_zoo_texts() if "▁" not in text]
    counts, frequency = counted(source, pivot, some)
    corpus = count_texts(some, ours.reader, theirs.reader, None)
    assert {(s, p): n for s, row in images(corpus.pairs).items() for p, n in row.items()} == counts
    assert {token: n for token, n in enumerate(corpus.frequency.tolist()) if n} == dict(frequency)
    made = images(vocabulary.statistics(Vocabularies(ours.reader, theirs.reader), corpus.pairs, most))
    expected: Images = {token: {image: 1.0} for token, image in by_function(source, pivot).items()}
    for token in {s for s, _ in counts} & ours.text.keys():
        row = {p: n for (s, p), n in counts.items() if s == token and p in theirs.text}
        if not row:
            continue
        if most:
            kept = sorted(row, key=lambda p: (-row[p], p))[:most]
            expected[token] = {p: row[p] / sum(row[q] for q in kept) for p in kept}
        else:
            far = {p: edits(word_of(ours, token), word_of(theirs, p)) for p in row}
            expected[token] = {min(row, key=lambda p: (far[p] / row[p], -row[p], p)): 1.0}
    assert made == {token: pytest.approx(row, rel=1e-6) for token, row in expected.items()}


@pytest.mark.parametrize(("source", "pivot"), [("gpt2", "llama"), ("gpt2", "unigram")])
def test_co_occurrence_is_what_the_loops_of_the_release_give(source: str, pivot: str) -> None:
    """Of the tokens nearest to one of the source's, the one with the highest cosine of their neighbours."""
    ours, theirs = kind(source), kind(pivot)
    some = tokenizer_zoo_texts()
    both = Vocabularies(ours.reader, theirs.reader)
    neighbours = count_neighbours(
        text_blocks(some), Reader(ours.reader, DIALOGUES), Reader(theirs.reader, DIALOGUES)
    )
    near_s, near_p = (neighbours_by_loops(one, some) for one in (ours, theirs))
    assert images(neighbours.source) == near_s
    assert images(neighbours.pivot) == near_p
    default = images(vocabulary.min_edit_distance(both))
    made = images(co_occurrence(both, neighbours))
    exact, special = exact_by_brute_force(source, pivot), by_function(source, pivot)
    common = {image for token, row in default.items() if token not in special for image in row}
    changed = 0
    for token in made:
        if token in special or token in exact or token not in near_s:
            assert made[token] == default[token]
            continue
        far = {p: edits(word_of(ours, token), word_of(theirs, p)) for p in theirs.text}
        tied = [p for p in sorted(far) if far[p] == min(far.values())]
        row: Counter[int] = Counter()
        for other, number in near_s[token].items():
            row.update({image: number for image in default.get(other, ()) if other not in special})
        cosines = {}
        for p in tied:
            its = {other: number for other, number in near_p.get(p, {}).items() if other in common}
            length = math.sqrt(sum(number**2 for number in its.values())) or 1.0
            cosines[p] = sum(row[other] * number for other, number in its.items()) / length
        (image,) = made[token]
        assert cosines[image] == pytest.approx(max(cosines.values()), rel=1e-12)
        changed += made[token] != default[token]
    assert changed > 2


def neighbours_by_loops(one: Kind, some: list[str]) -> Images:
    """FuseLLM's loops, with window 5, over the tokens of text that follow another."""
    rows: dict[int, Counter[int]] = {}
    for tokens in one.reader.encode(some):
        row = tokens.ids[max(1, np.count_nonzero(tokens.ends == 0)) :].tolist()
        for i, token in enumerate(row):
            for j in range(max(0, i - 5), min(i + 5, len(row))):
                if i != j:
                    rows.setdefault(token, Counter())[row[j]] += 1
                    rows.setdefault(row[j], Counter())[token] += 1
    return {token: dict(row) for token, row in rows.items()}


def text_blocks(some: list[str]) -> list[Block]:
    """Each text one answer."""
    return [Block("", n, "", text, (whole_text(len(text.encode())),), 0) for n, text in enumerate(some)]


def count_texts(some: list[str], source: TextTokenizer, pivot: TextTokenizer, contained: int | None) -> Corpus:
    return count(text_blocks(some), Reader(source, DIALOGUES), Reader(pivot, DIALOGUES), contained)


@cache
def tokenizer_zoo_texts() -> list[str]:
    return [*tiny_tokenizers.TEXT, *(" ".join(random.Random(n).sample(tiny_tokenizers.TEXT, 2)) for n in range(9))]


def counted(source: str, pivot: str, some: list[str]) -> tuple[Mapping[tuple[int, int], int], Counter[int]]:
    ours, theirs = kind(source), kind(pivot)
    counts: Counter[tuple[int, int]] = Counter()
    frequency: Counter[int] = Counter()
    for text, of_source, of_pivot in zip(some, ours.reader.encode(some), theirs.reader.encode(some), strict=True):
        last_s, last_p = ours.last_read(of_source, text), theirs.last_read(of_pivot, text)
        for end in last_s.keys() & last_p.keys():
            j, i = last_s[end], last_p[end]
            if j is None or i is None or j + 1 == len(of_source) or i + 1 == len(of_pivot):
                continue
            counts[int(of_source.ids[j + 1]), int(of_pivot.ids[i + 1])] += (
                1  # what begins where both have read the same
            )
        frequency.update(of_pivot.ids.tolist())
    return counts, frequency


def test_counts_of_parts_of_a_corpus_add_up() -> None:
    ours, theirs, some = kind("gpt2").reader, kind("llama").reader, tokenizer_zoo_texts()
    for contained in (None, *CONTAINED.values()):
        whole = count_texts(some, ours, theirs, contained)
        parts = count_texts(some[:4], ours, theirs, contained) + count_texts(some[4:], ours, theirs, contained)
        assert images(parts.pairs) == images(whole.pairs)
        assert parts.frequency.tolist() == whole.frequency.tolist()
    assert count_texts([], ours, theirs, None).pairs.nnz == 0


def test_saved_counts_come_back_without_their_zeros_on_the_disk(tmp_path: Path) -> None:
    ours, theirs, some = kind("gpt2").reader, kind("llama").reader, tokenizer_zoo_texts()
    counts = count_texts(some[:2], ours, theirs, None)
    save_counts(tmp_path / "counts", {"source": "s"}, counts, 2)
    again, blocks = load_counts(tmp_path / "counts", {"source": "s"})
    assert (blocks, images(again.pairs), again.pairs.shape) == (2, images(counts.pairs), counts.pairs.shape)
    assert again.pairs.dtype == counts.pairs.dtype == np.int64
    assert (again.frequency.tolist(), again.frequency.dtype) == (counts.frequency.tolist(), counts.frequency.dtype)
    _, saved = load_arrays(tmp_path / "counts", "fusion-trainer corpus count")
    assert len(saved["source"]) == len(saved["pivot"]) == counts.pairs.nnz
    assert len(saved["ids"]) == np.count_nonzero(counts.frequency)
    assert all(len(array) < 150 for array in saved.values())


# Of every method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("source", "pivot"), TWO_OF_A_KIND)
def test_rows_sum_to_one_or_are_empty(method: vocabulary.Method, source: str, pivot: str) -> None:
    ours, theirs = kind(source).reader, kind(pivot).reader
    for most in (0, 4):
        made = build_map(
            method,
            ours,
            theirs,
            lambda: count_texts(tokenizer_zoo_texts(), ours, theirs, None),
            most,
            neighbours=lambda: count_neighbours(
                text_blocks(tokenizer_zoo_texts()), *(Reader(one, DIALOGUES) for one in (ours, theirs))
            ),
        )
        assert made.method == method
        assert made.matrix.shape == (max(ours.surfaces) + 1, max(theirs.surfaces) + 1)
        assert made.matrix.dtype == np.float32
        sums = np.asarray(made.matrix.sum(1))
        assert np.all((sums == 0) | (abs(sums - 1) < 1e-6))
        assert made.mapped.tolist() == (sums > 0).tolist()
        assert (made.matrix.data > 0).all()
        assert made.mapped.sum() > 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MAKERS)
def test_identical_tokenizers_are_recognised_and_need_no_corpus(method: vocabulary.Method, name: str) -> None:
    one = kind(name).reader
    again = TextTokenizer(tokenizer_zoo.MAKERS[name]().tokenizer, "again")
    made = build_map(method, one, again, lambda: pytest.fail("the corpus was counted"))
    assert made.method == "identical"
    assert images(made) == {token: {token: 1.0} for token in one.surfaces}


def test_tokens_added_to_one_of_two_identical_tokenizers_do_not_matter() -> None:
    plain, more = (TextTokenizer(tiny_tokenizers.train("unigram", special=added), "") for added in ((), ("<x>",)))
    longer = TextTokenizer(tiny_tokenizers.train("unigram", special=("<x>", "<y>", "<z>")), "")
    shared = {token: {token: 1.0} for token in plain.surfaces}
    for source, pivot in ((plain, more), (more, plain), (plain, longer), (longer, plain)):
        made = vocabulary.identical(Vocabularies(source, pivot))
        assert made is not None
        assert images(made) == shared
    made = vocabulary.identical(Vocabularies(more, longer))
    assert made is not None
    assert images(made) == {token: {token: 1.0} for token in more.surfaces}


def test_tokenizers_that_differ_in_a_token_are_not_identical() -> None:
    words = ["a", "b", "c", "ab"]
    one = byte_level(words, added=["<x>"])
    assert vocabulary.identical(Vocabularies(one, byte_level([*words, "bc"]))) is None
    assert vocabulary.identical(Vocabularies(one, byte_level(["a", "b", "c", "bc"], added=["<x>"]))) is None
    assert vocabulary.identical(Vocabularies(one, byte_level(["b", "a", "c", "ab"], added=["<x>"]))) is None
    assert vocabulary.identical(Vocabularies(byte_level(words), byte_level([*words, "bc"]))) is None
    same = vocabulary.identical(Vocabularies(one, byte_level(words, added=["<x>", "<y>"])))
    assert same is not None
    assert images(same) == {token: {token: 1.0} for token in range(5)}
    other = vocabulary.identical(Vocabularies(one, byte_level(words, added=["<y>", "<x>"])))
    assert other is not None
    assert images(other) == {**{token: {token: 1.0} for token in range(4)}, 4: {5: 1.0}}


def test_tokenizers_without_a_common_token_end_in_a_message() -> None:
    with pytest.raises(
        UserError, match=r"the map `exact` maps no token of byte-level to .*tokenizers that the stores"
    ):
        build_map(
            "exact",
            byte_level(["a", "b"]),
            sentencepiece(["x", "y"]),
            lambda: pytest.fail("the corpus was counted"),
        )


# On the disk


def test_a_map_is_built_once_and_reused_for_the_same_identity(tmp_path: Path) -> None:
    ours, theirs = kind("gpt2").reader, kind("unigram").reader
    built = []
    moved: Places = {"source": ("elsewhere", None), "pivot": PLACES["pivot"]}

    def build() -> VocabularyMap:
        built.append(1)
        return vocabulary.prefix(Vocabularies(ours, theirs))

    made = saved_map(tmp_path / "maps", {"source": "s", "pivot": "p", "method": "prefix"}, PLACES, build)
    (path,) = (tmp_path / "maps").iterdir()
    before = path.read_bytes()
    again = saved_map(tmp_path / "maps", {"method": "prefix", "source": "s", "pivot": "p"}, moved, build)
    assert len(built) == 1
    assert images(again.map) == images(made.map)
    assert again.map.matrix.shape == made.map.matrix.shape
    assert again.places == made.places == PLACES  # where the tokenizers are does not make another map
    saved_map(tmp_path / "maps", {"source": "s", "pivot": "q", "method": "prefix"}, PLACES, build)
    assert len(built) == len(list((tmp_path / "maps").iterdir())) == 2
    assert path.read_bytes() == before
    loaded = load_map(path)
    assert loaded.path == made.path == path
    assert loaded.identity == {"source": "s", "pivot": "p", "method": "prefix"}
    assert (loaded.map.method, images(loaded.map), loaded.places) == ("prefix", images(made.map), PLACES)


def test_a_file_under_the_name_of_a_map_of_something_else_is_refused(tmp_path: Path) -> None:
    made = vocabulary.prefix(Vocabularies(byte_level(["a", "b", "ab"]), sentencepiece(["a", "b"])))
    saved_map(tmp_path, {"source": "one"}, PLACES, lambda: made)
    (path,) = tmp_path.iterdir()
    saved_map(tmp_path, {"source": "other"}, PLACES, lambda: made)
    (other,) = set(tmp_path.iterdir()) - {path}
    other.write_bytes(path.read_bytes())
    with pytest.raises(
        UserError,
        match=r"(?s)vocabulary map.* made from other inputs.*source +other +one.*Remove that file",
    ):
        saved_map(tmp_path, {"source": "other"}, PLACES, lambda: made)


@pytest.mark.parametrize("content", [None, b"", b"not a map", b"{}" * 100])
def test_a_file_that_is_not_a_map_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is not a fusion-trainer vocabulary map"):
        load_map(path)


def test_coverage_reports_what_share_is_mapped_and_what_is_not() -> None:
    source = byte_level(["a", "b", "c", "x", "ab"], added=["<|end|>"])
    pivot = sentencepiece(["a", "b", "ab", "z"])
    made = vocabulary.exact(Vocabularies(source, pivot))
    mass = np.zeros(6)
    for word, share in {"a": 5.0, "ab": 1.0, "x": 3.0, "c": 0.5, "<|end|>": 0.5}.items():
        mass[ids(source)[word]] = share
    shown = coverage(made, source, pivot, mass)
    assert "3 of 6 ids (50.0%), of which exact 100.0%" in shown
    assert "60.00% of what the store's top k hold, of which exact 100.00%" in shown
    assert "lose most" not in shown
    worst = [line.split()[1] for line in shown.split("image:\n")[1].split("some rows:")[0].splitlines()]
    assert worst == ["b'x'", "b'c'", "b'<|end|>'"]
    assert "b'ab' → b'ab' 1.00" in shown
    plain = coverage(made, source, pivot, None)
    assert "3 of 6 ids (50.0%)" in plain
    assert "probability" not in plain


def test_coverage_names_the_twenty_worst_and_ten_rows() -> None:
    source, pivot = kind("gpt2").reader, kind("llama").reader
    mass = np.random.default_rng(0).random(max(source.surfaces) + 1)
    made = vocabulary.exact(Vocabularies(source, pivot))
    lines = coverage(made, source, pivot, mass).splitlines()
    worst = [int(line.split()[0]) for line in lines if line.startswith("  ") and "→" not in line]
    unmapped = [token for token in source.surfaces if not made.mapped[token]]
    assert worst == sorted(unmapped, key=lambda token: -mass[token])[:20]
    assert sum("→" in line for line in lines) == 10


def test_coverage_names_the_mapped_ids_that_lose_most() -> None:
    """By probability × edit distance over the longer text; several images by their weights."""
    source = byte_level(["a", "b", "c", "d", "ab", "cd", "abcd", "x", "y", "xy", "z"])
    pivot = byte_level(["a", "b", "ab", "x", "q"])
    named, theirs = ids(source), ids(pivot)
    table = np.zeros((11, 5), np.float32)
    images_of = {
        "a": {"a": 1.0},
        "abcd": {"ab": 1.0},
        "xy": {"x": 0.75, "q": 0.25},
        "x": {"x": 1.0},
        "z": {"q": 1.0},
    }
    for word, row in images_of.items():
        for image, share in row.items():
            table[named[word], theirs[image]] = share
    made = VocabularyMap(csr_array(table), "statistics")
    mass = np.zeros(13)  # two rows more than the tokenizer has ids
    for word, share in {"a": 6.0, "b": 1.0, "abcd": 2.0, "xy": 0.8, "x": 0.5, "z": 0.1}.items():
        mass[named[word]] = share
    mass[12] = 0.6
    shown = coverage(made, source, pivot, mass)
    assert "5 of 11 ids (45.5%), of which exact 40.0%" in shown
    assert f"{9.4 / 11:.2%} of what the store's top k hold, of which exact {6.5 / 9.4:.2%}" in shown
    worst = shown.split("share of its length:\n")[1].split("some rows:")[0].splitlines()
    losses = {"abcd": 2 * 2 / 4, "xy": 0.8 * (0.75 / 2 + 0.25), "z": 0.1}
    assert [line.split()[0] for line in worst] == [str(named[word]) for word in losses]
    assert [float(line.split()[-1]) for line in worst] == pytest.approx(list(losses.values()), rel=1e-2)
    assert "b'xy' → b'x' 0.75, b'q' 0.25" in worst[1]
    plain = coverage(made, source, pivot, None).split("share of its length:\n")[1].splitlines()
    assert [line.split()[0] for line in plain[:3]] == [str(named[word]) for word in ("z", "xy", "abcd")]


def test_coverage_names_twenty_of_the_mapped_ids() -> None:
    source, pivot = kind("gpt2").reader, kind("llama").reader
    made = vocabulary.prefix(Vocabularies(source, pivot))
    shown = coverage(made, source, pivot, np.random.default_rng(0).random(max(source.surfaces) + 1))
    worst = shown.split("share of its length:\n")[1].split("some rows:")[0].splitlines()
    losses = [float(line.split()[-1]) for line in worst]
    assert len(losses) == 20
    assert losses == sorted(losses, reverse=True)
    assert all(source.surfaces[int(line.split()[0])] not in pivot.surfaces.values() for line in worst)
