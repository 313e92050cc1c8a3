"""Which positions of two tokenizers correspond: by the bytes they have read, and by the papers' time warping."""

import itertools
import random
import time
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import tokenizer_zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import EXACT, FRAGMENTS, MAKERS, NORMALIZING, Kind, boundary_pairs, kind

from fusion_trainer.alignment import positions
from fusion_trainer.alignment.positions import CONTAINED, Pairs, warping_path, word_costs
from fusion_trainer.text.tokenizer import Tokens

property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)
COUPLES = list(itertools.combinations(MAKERS, 2))
TEXTS_OF_A_COUPLE = 360
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=6).map("".join)


@cache
def random_texts() -> list[str]:
    rng = random.Random(2402_16107)
    return [tokenizer_zoo.random_text(rng) for _ in range(TEXTS_OF_A_COUPLE * len(COUPLES))]


def as_list(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.pivot.tolist(), pairs.source.tolist(), strict=True))


def ends_wrong(one: Kind, tokens: Tokens, text: str) -> dict[int, tuple[int | None, int | None]]:
    """Bytes at which the last token that ends there is not the one the truth has: (found, true)."""
    found = {end: position for position, end in enumerate(tokens.ends.tolist())}
    truth = one.last_read(tokens, text)
    return {end: (found.get(end), true) for end, true in truth.items() if found.get(end) != true}


def pairs_wrong(pivot: Kind, source: Kind, of_pivot: Tokens, of_source: Tokens, text: str) -> set[tuple[int, int]]:
    """Pairs that are false or missed, among the positions at which both have read a head that is known."""
    p, s = pivot.last_read(of_pivot, text), source.last_read(of_source, text)
    known = p.keys() & s.keys()
    true = {(i, j) for end in known if (i := p[end]) is not None and (j := s[end]) is not None}
    found = as_list(boundary_pairs(of_pivot, of_source))
    assert found == as_list(positions.boundary_pairs(of_pivot, of_source))
    assert len(found) == len(dict(found)) == len({j for _, j in found})  # each position at most once
    assert found == sorted(found)
    assert [j for _, j in found] == sorted(j for _, j in found)
    judged = {(i, j) for i, j in found if {int(of_pivot.ends[i]), int(of_source.ends[j])} <= known}
    return judged ^ true


def test_ten_thousand_texts_of_eight_kinds_are_read() -> None:
    assert len(random_texts()) >= 10_000
    assert len(MAKERS) >= 6
    everything = "".join(random_texts())
    assert {ord(char) >> 16 for char in everything} == set(range(17))
    assert all(fragment in everything for fragment in FRAGMENTS)
    assert len(set(random_texts())) > 8000


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_token_ends_where_the_bytes_it_stands_for_end(name: str) -> None:
    """For all texts; of a tokenizer that rewrites, at the bytes where heads can be rewritten alone."""
    one, wrong = kind(name), []
    for text, tokens in zip(random_texts(), one.reader.encode(random_texts()), strict=True):
        ends = tokens.ends.tolist()
        assert ends == sorted(ends)
        assert not ends or (ends[0] >= 0 and ends[-1] == len(text.encode()))
        if name in EXACT and ends != one.truth(tokens, text):
            wrong.append((text, ends, one.truth(tokens, text)))
        elif name in NORMALIZING and (errors := ends_wrong(one, tokens, text)):
            wrong.append((text, ends, errors))
    wrong.sort(key=lambda case: len(case[0]))
    assert not wrong, f"{len(wrong)} texts, the shortest {wrong[:3]}"


@pytest.mark.parametrize("name", MAKERS)
def test_long_runs_of_blanks_and_marks_end_where_they_should(name: str) -> None:
    """Each of more characters than decide whether a cluster can be cut, beside one that is rewritten."""
    one = kind(name)
    runs = [" " * 300, "\n \t" * 90, "\u3000 " * 150, "e" + "\u0301\u0323" * 90, "한" + "\u11a8" * 150]
    for run in runs:
        text = f"e\u0301 x{run}y e\u0301{run}"
        (tokens,) = one.reader.encode([text])
        if name in EXACT:
            assert tokens.ends.tolist() == one.truth(tokens, text)
        elif name in NORMALIZING:
            assert not ends_wrong(one, tokens, text)


@pytest.mark.parametrize("name", NORMALIZING)
def test_a_long_run_of_blanks_is_read_in_a_time_that_grows_with_its_length(name: str) -> None:
    """By trying every cut of the whole run this would take minutes."""
    start = time.perf_counter()
    (tokens,) = kind(name).reader.encode(["e\u0301" + " " * 60_000])
    assert time.perf_counter() - start < 10
    assert tokens.ends[-1] == 60_003


@pytest.mark.slow
@pytest.mark.parametrize(("pivot", "source"), COUPLES)
def test_pairs_have_read_the_same_bytes_and_no_such_pair_is_missed(pivot: str, source: str) -> None:
    p, s = kind(pivot), kind(source)
    first = COUPLES.index((pivot, source)) * TEXTS_OF_A_COUPLE
    some = random_texts()[first : first + TEXTS_OF_A_COUPLE]
    wrong, paired = [], 0
    for text, of_pivot, of_source in zip(some, p.reader.encode(some), s.reader.encode(some), strict=True):
        if errors := pairs_wrong(p, s, of_pivot, of_source, text):
            wrong.append((text, errors))
        pairs = boundary_pairs(of_pivot, of_source)
        assert {(j, i) for i, j in as_list(pairs)} == set(as_list(boundary_pairs(of_source, of_pivot)))
        assert pairs.pivot.dtype == pairs.source.dtype == np.int32
        paired += len(pairs)
    wrong.sort(key=lambda case: len(case[0]))
    assert not wrong, f"{len(wrong)} texts, the shortest {wrong[:3]}"
    assert paired > 5 * len(some)


@property_test
@given(st.sampled_from(COUPLES), texts)
def test_pairs_have_read_the_same_bytes_in_any_text(couple: tuple[str, str], text: str) -> None:
    pivot, source = map(kind, couple)
    (of_pivot,), (of_source,) = pivot.reader.encode([text]), source.reader.encode([text])
    assert not pairs_wrong(pivot, source, of_pivot, of_source, text)


@pytest.mark.parametrize(("pivot", "source"), itertools.permutations(EXACT, 2))
def test_paired_tokens_spell_the_same_head_of_the_text(pivot: str, source: str) -> None:
    """The bytes themselves, put together token by token: a space put before the text aside, they are the same."""
    text = "naïve 鿿 café: 🙂\n\n  def f(a):\n    return 12, 34 日本語 e\u0301 👩‍👩‍👧"
    read = []
    for one in (kind(pivot), kind(source)):
        (tokens,) = one.reader.encode([text])
        names = tokens.ids[len(one.reader.prefix) :].tolist()
        spelt = [b"".join(one.surfaces[token] for token in names[:number]) for number in range(len(names) + 1)]
        put_before = len(spelt[-1]) - len(text.encode())
        assert put_before in (0, 1)
        heads = [b""] * len(one.reader.prefix) + [head[put_before:] for head in spelt[1:]]
        read.append((tokens, heads))
    (of_pivot, heads_p), (of_source, heads_s) = read
    pairs = as_list(boundary_pairs(of_pivot, of_source))
    assert all(heads_p[i] == heads_s[j] for i, j in pairs)
    assert {heads_p[i] for i, _ in pairs} == set(heads_p) & set(heads_s)
    assert len(pairs) > 20


def test_the_name_of_a_byte_written_out_is_text() -> None:
    """Unigram reads it as the byte's token, which stands for six bytes of the text then."""
    text = "a <0x0A> b\n"
    for name in ("unigram", "llama", "gpt2"):
        one = kind(name)
        (tokens,) = one.reader.encode([text])
        assert tokens.ends.tolist() == one.truth(tokens, text)
        assert {1, 8, 10, 11} <= set(tokens.ends.tolist())


def tokens_ending_at(ends: Sequence[int]) -> Tokens:
    return Tokens(np.arange(len(ends), dtype=np.int32), np.array(ends, np.int32))


ascending_ends = st.lists(st.integers(0, 12), max_size=15).map(sorted)


@property_test
@given(ascending_ends, ascending_ends)
def test_of_tokens_with_one_end_only_the_last_is_paired(ends_p: list[int], ends_s: list[int]) -> None:
    last_p, last_s = ({end: place for place, end in enumerate(ends)} for ends in (ends_p, ends_s))
    expected = [(last_p[end], last_s[end]) for end in sorted(last_p.keys() & last_s.keys())]
    assert as_list(boundary_pairs(tokens_ending_at(ends_p), tokens_ending_at(ends_s))) == expected


def test_pairs_worked_by_hand() -> None:
    pivot = tokens_ending_at([0, 3, 7, 8, 8, 12])  # BOS first; two tokens of one character at 8
    source = tokens_ending_at([2, 3, 8, 10, 12])  # no BOS
    assert as_list(boundary_pairs(pivot, source)) == [(1, 1), (4, 2), (5, 4)]
    assert as_list(boundary_pairs(pivot, tokens_ending_at([]))) == []
    assert as_list(boundary_pairs(tokens_ending_at([0]), tokens_ending_at([0]))) == [(0, 0)]


# Time warping


@cache
def edits(one: str, other: str) -> int:
    """Levenshtein's distance, by its recurrence."""
    if not one or not other:
        return len(one) + len(other)
    same = one[-1] == other[-1]
    return min(edits(one[:-1], other) + 1, edits(one, other[:-1]) + 1, edits(one[:-1], other[:-1]) + (not same))


def cost(one: str, other: str, contained: int) -> int:
    """In tenths of an edit."""
    return edits(one, other) * (contained if one in other or other in one else 10)


def transcription(pivot: Sequence[str], source: Sequence[str], contained: int) -> list[tuple[int, int]]:
    """The papers' recurrence, cell by cell, and the way back: diagonal, then source, then pivot."""
    far = 1 << 60
    D = [[far] * (len(source) + 1) for _ in range(len(pivot) + 1)]
    D[0][0] = 0
    for i in range(1, len(pivot) + 1):
        for j in range(1, len(source) + 1):
            before = min(D[i - 1][j - 1], D[i][j - 1], D[i - 1][j])
            D[i][j] = cost(pivot[i - 1], source[j - 1], contained) + before
    i, j = len(pivot), len(source)
    path = [(i, j)]
    while (i, j) != (1, 1):
        steps = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]  # the first of equals
        i, j = min(steps, key=lambda step: D[step[0]][step[1]])
        path.append((i, j))
    return [(i - 1, j - 1) for i, j in path[::-1]]


@pytest.mark.parametrize("contained", CONTAINED.values(), ids=CONTAINED)
def test_every_small_warping_is_the_transcriptions(contained: int) -> None:
    """Two letters and words of at most two: most cells have equal predecessors."""
    rng = random.Random(37)
    words = ["", "a", "b", "ab", "ba", "aa"]
    for case in range(4000):
        longest = rng.choice((1, 2, 3, 5, 9))
        pivot, source = ([rng.choice(words) for _ in range(rng.randint(1, longest))] for _ in range(2))
        path = as_list(warping_path(pivot, source, contained))
        assert path == transcription(pivot, source, contained), (case, pivot, source)


@pytest.mark.parametrize("contained", CONTAINED.values(), ids=CONTAINED)
@pytest.mark.parametrize(
    ("n", "m"), [(1, 90), (90, 1), (2, 80), (70, 64), (64, 70), (65, 65), (40, 140), (130, 30)]
)
def test_warpings_of_unequal_lengths_are_the_transcriptions(n: int, m: int, contained: int) -> None:
    """Beyond the antidiagonals that are laid out together, both ways round."""
    rng = random.Random(n * 1000 + m)
    for alphabet in ("a", "ab", "abcdefgh"):
        pivot, source = (["".join(rng.choices(alphabet, k=rng.randint(0, 3))) for _ in range(k)] for k in (n, m))
        assert as_list(warping_path(pivot, source, contained)) == transcription(pivot, source, contained)


@pytest.mark.parametrize("contained", CONTAINED.values(), ids=CONTAINED)
@pytest.mark.parametrize(("pivot", "source"), [("llama", "gpt2"), ("qwen2", "unigram"), ("gemma", "mistral")])
def test_the_warping_of_a_real_text_is_the_transcriptions(pivot: str, source: str, contained: int) -> None:
    text = "GPT4 Correct User: Sort 3, 1, 2.<|end_of_turn|>GPT4 Assistant: Naïve 日本語:\n\n  1, 2  3 🙂 so on"
    words = []
    for one in (kind(pivot), kind(source)):
        (tokens,) = one.reader.encode([text])
        words.append([one.reader.words[token] for token in tokens.ids.tolist()])
    assert min(map(len, words)) > 30
    assert as_list(warping_path(*words, contained)) == transcription(*words, contained)


def costs_of_tokens(rows: Sequence[str], columns: Sequence[str], contained: int) -> np.ndarray:
    """[rows, columns]; ``word_costs`` has every word only once."""
    costs, row_of, column_of = word_costs(rows, columns, contained)
    return costs[row_of][:, column_of]


@pytest.mark.parametrize("contained", CONTAINED.values(), ids=CONTAINED)
def test_costs_are_tenths_of_edits(contained: int) -> None:
    rng = random.Random(5)
    rows, columns = (["".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(40)] for _ in range(2))
    table = costs_of_tokens(rows, columns, contained)
    assert table.dtype == np.uint16
    assert table.tolist() == [[cost(row, column, contained) for column in columns] for row in rows]


def test_costs_worked_by_hand() -> None:
    table = costs_of_tokens(["hello", "", "lo"], ["hello", "hell", "yellow", "", "ol"], CONTAINED["fusechat"])
    assert table.tolist() == [[0, 1, 20, 5, 40], [5, 4, 6, 0, 2], [3, 30, 4, 2, 20]]
    table = costs_of_tokens(["hello", "", "lo"], ["hello", "hell", "yellow", "", "ol"], CONTAINED["fusellm"])
    assert table.tolist() == [[0, 10, 20, 50, 40], [50, 40, 60, 0, 20], [30, 30, 40, 20, 20]]


@pytest.mark.parametrize("contained", CONTAINED.values(), ids=CONTAINED)
@pytest.mark.parametrize("name", MAKERS)
def test_a_text_warps_onto_itself_along_the_diagonal(name: str, contained: int) -> None:
    one = kind(name)
    (tokens,) = one.reader.encode(["The quick brown fox  jumps\nover the 1, 2, 3 lazy dogs 日本語"])
    words = [one.reader.words[token] for token in tokens.ids.tolist()]
    assert as_list(warping_path(words, words, contained)) == [(i, i) for i in range(len(words))]


def test_no_tokens_have_no_warping() -> None:
    for pivot, source in (([], []), (["a"], []), ([], ["a", "b"])):
        assert as_list(warping_path(pivot, source)) == []


def test_a_path_goes_from_the_first_of_both_to_the_last_step_by_step() -> None:
    rng = random.Random(8)
    for _ in range(100):
        pivot, source = (rng.choices(["the", "then", "a", "", "hen"], k=rng.randint(1, 30)) for _ in range(2))
        path = as_list(warping_path(pivot, source))
        assert path[0] == (0, 0)
        assert path[-1] == (len(pivot) - 1, len(source) - 1)
        steps = {(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(path)}
        assert steps <= {(1, 1), (0, 1), (1, 0)}
