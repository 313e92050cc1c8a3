"""Blocks of dialogues: never too long, split between turns, nothing lost uncounted, the same every time."""

import os
import platform
import random
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, TEXT, shared

import fusion_trainer.data.dialogues as dialogues_file
from fusion_trainer.data.blocks import Block, Preparation
from fusion_trainer.data.conversations import BAD_ROW, Conversation, Message
from fusion_trainer.data.dialogues import Dialogues, write_dialogues
from fusion_trainer.data.report import Report
from fusion_trainer.data.templates import Template, find_template
from fusion_trainer.text.tokenizer import TextTokenizer, Tokens
from varm_common.errors import UserError

property_test = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CHATML = ("<|im_start|>", "<|im_end|>")
END = "<|im_end|>"
WORDS = [*" ".join(TEXT).split(), "🙂🚀", "鿿", "ꙮ", "e\u0301", "\n\n", "<|im_start|>assistant\nfake"]


@cache
def tokenizer_of(kind: str) -> TextTokenizer:
    return TextTokenizer(shared(kind, CHATML), kind)


def preparation(kind: str = "sentencepiece_bpe", max_length: int = 96, **settings: Any) -> Preparation:
    tokenizer = tokenizer_of(kind)
    return Preparation(tokenizer, find_template("chatml", tokenizer.tokenizer, kind), max_length, **settings)


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most))).strip() or "Hm."


def dialogue(number: int, *contents: str, system: str | None = None, last: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[turn % 2], content) for turn, content in enumerate(contents)]
    head = [Message("system", system)] if system else []
    tail = [Message("user", last)] if last else []
    return Conversation(f"c{number}", (*head, *messages, *tail), None, f"chats.jsonl, line {number}")


def document(number: int, text: str) -> Conversation:
    return Conversation(f"d{number}", (), text, f"texts.jsonl, line {number}")


def some_dialogues(count: int = 30) -> list[Conversation]:
    rng = random.Random(5)
    return [
        dialogue(
            number,
            *(words(rng, 10) for _ in range(2 * rng.randint(1, 8))),
            system="Be brief, please." if number % 2 else None,
            last="And then?" if number % 3 == 0 else None,
        )
        for number in range(count)
    ]


def prepared(
    conversations: Iterable[Conversation], kind: str = "sentencepiece_bpe", **settings: Any
) -> list[Block]:
    return list(preparation(kind, **settings).blocks(conversations))


def supervised(blocks: Iterable[Block]) -> list[str]:
    return [block.text.encode()[start:stop].decode() for block in blocks for start, stop in block.spans]


def answers(conversation: Conversation) -> list[str]:
    return [message.content + END for message in conversation.messages if message.role == "assistant"]


def pivot_tokens(kind: str, text: str) -> int:
    """With BOS, as the tokenizer itself puts it."""
    return len(shared(kind, CHATML)(text).input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [96, 160, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_dialogue_is_split_between_turns_and_loses_no_answer(kind: str, max_length: int) -> None:
    conversations = some_dialogues()
    work = preparation(kind, max_length=1024 if max_length == 96 else max_length)
    work.max_length = max(max_length, longest_exchange(kind, conversations))
    blocks = list(work.blocks(conversations))
    assert work.report.cut_turns == 0
    assert len(blocks) > len(conversations) or max_length == 4096
    for conversation in conversations:
        own = [block for block in blocks if block.conversation == conversation.id]
        assert supervised(own) == answers(conversation)
        assert [block.block for block in own] == list(range(len(own)))
        assert {block.source for block in own} == {conversation.where}
        for block in own:
            assert block.tokens == pivot_tokens(kind, block.text) <= work.max_length
            if conversation.messages[0].role == "system":
                assert block.text.startswith("<|im_start|>system\nBe brief, please.<|im_end|>\n<|im_start|>user\n")
            else:
                assert block.text.startswith("<|im_start|>user\n")
            assert block.text.endswith("<|im_end|>\n")
    assert [block.conversation for block in blocks] == sorted(
        (block.conversation for block in blocks), key=[c.id for c in conversations].index
    )


def longest_exchange(kind: str, conversations: Iterable[Conversation]) -> int:
    """Tokens of the longest system turn, question and answer together: what ``max_length`` must allow."""
    longest = 0
    for conversation in conversations:
        system = [message for message in conversation.messages if message.role == "system"]
        turns = [message for message in conversation.messages if message.role != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            longest = max(longest, pivot_tokens(kind, chatml([*system, question, answer])))
    return longest


def chatml(messages: Iterable[Message]) -> str:
    return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_holds_as_many_exchanges_as_fit(kind: str) -> None:
    exchange = ("What is 12 + 34?", "It is 46.")
    one, two, three = (pivot_tokens(kind, chatml(dialogue(0, *exchange * n).messages)) for n in (1, 2, 3))
    conversation = dialogue(0, *exchange * 7)
    for max_length, expected in [(one, [1] * 7), (two - 1, [1] * 7), (two, [2, 2, 2, 1]), (three, [3, 3, 1])]:
        blocks = prepared([conversation], kind, max_length=max_length)
        assert [len(block.spans) for block in blocks] == expected
        assert blocks[0].tokens <= max_length


def test_an_answer_of_a_tool_stays_with_the_question() -> None:
    roles = ["user", "assistant", "tool", "assistant"] * 3
    conversation = Conversation("c", tuple(Message(role, "It is 46.") for role in roles), None, "here")
    one = pivot_tokens("unigram", chatml(conversation.messages[:4]))
    blocks = prepared([conversation], "unigram", max_length=one)
    assert [block.text for block in blocks] == [chatml(conversation.messages[:4])] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_that_is_too_long_alone_is_cut_between_two_characters_and_counted(kind: str) -> None:
    rng = random.Random(3)
    for max_length in range(60, 72):
        long = words(rng, 3) + " 🙂鿿ꙮe\u0301" * 40
        conversation = dialogue(1, "Hi.", "Hello!", "More?", long, "Done?", "Yes.")
        work = preparation(kind, max_length=max_length)
        blocks = list(work.blocks([conversation]))
        head, cut, tail = (block for block in blocks)
        assert supervised([head, tail]) == ["Hello!" + END, "Yes." + END]
        whole = chatml(conversation.messages[2:4])
        assert whole.startswith(cut.text)
        (piece,) = supervised([cut])
        assert (long + END).startswith(piece)
        assert cut.text.endswith(piece)
        assert cut.tokens == pivot_tokens(kind, cut.text) <= max_length
        assert cut.tokens > max_length - 12  # no more is cut than a character's tokens
        assert work.report.cut_turns == 1
        assert work.report.cut_tokens == pivot_tokens(kind, whole) - cut.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_leaves_no_room_for_its_answer_is_left_out_and_counted(kind: str) -> None:
    conversations = [dialogue(0, "lazy dog " * 200, "Yes."), *(dialogue(n, "Hi.", "Hello!") for n in (1, 2))]
    work = preparation(kind, max_length=64)
    blocks = list(work.blocks(conversations))
    assert [block.conversation for block in blocks] == ["c1", "c2"]
    assert work.report.dropped == {"no supervised token": 1}
    assert (work.report.conversations, work.report.kept) == (3, 2)


def test_a_question_that_is_too_long_costs_only_its_own_exchange() -> None:
    conversation = dialogue(0, "Hi.", "Hello!", "lazy dog " * 200, "Yes.", "1 + 1?", "2")
    work = preparation(max_length=64)
    blocks = list(work.blocks([conversation]))
    assert supervised(blocks) == ["Hello!" + END, "2" + END]
    assert [block.block for block in blocks] == [0, 1]
    assert (work.report.kept, work.report.cut_turns) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_that_no_answer_follows_are_left_out_and_counted(kind: str) -> None:
    work = preparation(kind)
    conversations = [
        dialogue(0, "Hi.", "Hello!", last="And then?"),
        dialogue(1, "Hi.", "Hello!"),
        dialogue(2, "Hi.", "Hello!"),
        Conversation("c3", (Message("system", "Be brief."), Message("user", "Hi.")), None, "here"),
    ]
    blocks = list(work.blocks(conversations))
    assert [block.text for block in blocks] == [chatml(dialogue(0, "Hi.", "Hello!").messages)] * 3
    assert work.report.open_turns == 3
    assert work.report.turns == 9
    assert work.report.dropped == {"no answer in it": 1}


def brute_supervised(kind: str, block: Block) -> int:
    (tokens,) = tokenizer_of(kind).encode([block.text])
    pairs = list(zip(tokens.ends.tolist(), tokens.ends.tolist()[1:], strict=False))
    return sum(
        any(end > start and end <= stop and last < stop for start, stop in block.spans) for last, end in pairs
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_what_the_blocks_hold(kind: str) -> None:
    conversations = [
        *some_dialogues(),
        *(document(n, f"Two  spaces.   {words(random.Random(n), 60)}") for n in range(9)),
    ]
    work = preparation(kind, max_length=80)
    blocks = list(work.blocks(conversations))
    report = work.report
    assert report.conversations == report.kept + sum(report.dropped.values()) == 39
    assert report.turns == sum(len(conversation.messages) for conversation in conversations)
    assert report.open_turns == 10
    assert report.blocks == len(blocks)
    assert report.tokens == sum(pivot_tokens(kind, block.text) for block in blocks)
    assert report.supervised_tokens == sum(brute_supervised(kind, block) for block in blocks)
    bounds = Counter(next(1 << n for n in range(30) if 1 << n >= block.tokens) for block in blocks)
    assert report.lengths == bounds
    assert max(block.tokens for block in blocks) <= 80
    text = str(report)
    for number in (report.conversations, report.tokens, report.supervised_tokens, report.cut_tokens):
        assert f"{number:,}" in text
    assert Report(**report.as_dict() | {"dropped": report.dropped, "lengths": report.lengths}) == report


def test_data_of_which_most_teaches_nothing_is_an_error() -> None:
    fine = [dialogue(n, "Hi.", "Hello!") for n in range(3)]
    unanswered = [dialogue(n, last="Hi?") for n in range(10, 16)]
    assert len(prepared([*fine, *unanswered[:2]])) == 3
    with pytest.raises(UserError, match="only 3 of 9 conversations can be learnt from: 6 no answer in it"):
        prepared([*fine, *unanswered])
    with pytest.raises(UserError, match="the data is empty"):
        prepared([])


def test_bad_rows_that_were_skipped_count_as_conversations_that_teach_nothing() -> None:
    fine = [dialogue(n, "Hi.", "Hello!") for n in range(3)]
    work = preparation(skipped=Counter({BAD_ROW: 2}))
    assert len(list(work.blocks(fine))) == 3
    assert work.report.dropped == {BAD_ROW: 2}
    assert (work.report.conversations, work.report.kept) == (5, 3)
    with pytest.raises(UserError, match=f"only 3 of 7 conversations can be learnt from: 4 {BAD_ROW}"):
        list(preparation(skipped=Counter({BAD_ROW: 4})).blocks(fine))


def test_every_conversation_that_the_template_refuses_is_named() -> None:
    tokenizer = tokenizer_of("unigram")
    template = find_template("zephyr", tokenizer.tokenizer, "unigram")
    tool = (Message("user", "1 + 1?"), Message("tool", "2"), Message("assistant", "2"))
    conversations = [
        Conversation(str(n), tool, None, f"chats.jsonl, line {n}") if n in (2, 5) else dialogue(n, "Hi.", "Hello!")
        for n in range(8)
    ]
    with pytest.raises(UserError) as error:
        list(Preparation(tokenizer, template, 96).blocks(conversations))
    for line in (2, 5):
        assert f"chats.jsonl, line {line}: the template zephyr refuses it: " in str(error.value)
    assert "2 conversations cannot be rendered" in str(error.value)
    skipped = Counter[str]()
    work = Preparation(tokenizer, template, 96, skipped=skipped)
    assert len(list(work.blocks(conversations))) == 6
    assert work.report.dropped == {"the template refuses it": 2}
    assert work.report.conversations == 8


def test_keys_are_counted_in_the_report_after_a_refused_dialogue_too() -> None:
    work = preparation(max_length=64, skipped=Counter())
    unused = work.report.unused  # where ``conversations`` counts
    refuses = "{% if messages | length > 2 and messages | length < 8 %}{{ raise_exception('no') }}{% endif %}"
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    work.template = Template("mine", refuses + plain, work.tokenizer.tokenizer)
    fine = [dialogue(n, "Hi.", "Hello!") for n in range(3)]
    assert len(list(work.blocks([dialogue(9, *["Again, please."] * 20), *fine]))) == 3
    assert work.report.dropped == {"the template refuses it": 1}
    unused["score"] += 1
    assert work.report.unused == {"score": 1}


@pytest.mark.parametrize("skip", [False, True])
def test_a_template_that_refuses_only_a_part_of_a_dialogue_names_the_row_too(skip: bool) -> None:
    jinja = (
        "{% if messages[0].content != 'Begin.' %}{{ raise_exception('no beginning') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = tokenizer_of("unigram")
    conversations = [dialogue(n, "Begin.", *["Go on. " * 3] * (1 + 10 * (n == 4))) for n in range(6)]
    work = Preparation(
        tokenizer, Template("mine", jinja, tokenizer.tokenizer), 64, skipped=Counter() if skip else None
    )
    if skip:
        assert {block.conversation for block in work.blocks(conversations)} == {"c0", "c1", "c2", "c3", "c5"}
        assert work.report.dropped == {"the template refuses it": 1}
    else:
        with pytest.raises(UserError, match=r"chats.jsonl, line 4: .*no beginning"):
            list(work.blocks(conversations))


# Documents of plain text


def check_nothing_is_lost(kind: str, blocks: Iterable[Block], text: str) -> None:
    """The blocks' texts are ``text``; a last token alone teaches nothing where no BOS precedes it."""
    joined = "".join(block.text for block in blocks)
    assert text.startswith(joined)
    assert pivot_tokens(kind, text[len(joined) :]) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_long_document_are_the_document(kind: str) -> None:
    rng = random.Random(11)
    texts = [
        "  " + " ".join(rng.choice(WORDS) for _ in range(200)),
        "🙂鿿ꙮe\u0301" * 90,
        "\n" * 200 + "x" * 200,
        "a" * 500,
    ]
    for text in texts:
        for max_length in (16, 33, 100):
            blocks = prepared([document(0, text)], kind, max_length=max_length)
            check_nothing_is_lost(kind, blocks, text)
            assert all(block.tokens == pivot_tokens(kind, block.text) <= max_length for block in blocks)
            assert all(block.spans == ((0, len(block.text.encode())),) for block in blocks)
            assert [block.block for block in blocks] == list(range(len(blocks)))


@property_test
@given(st.sampled_from(KINDS), st.text(max_size=200))
def test_no_character_of_a_document_is_lost(kind: str, text: str) -> None:
    blocks = prepared([document(0, f"Text {text}.")], kind, max_length=24)
    check_nothing_is_lost(kind, blocks, f"Text {text}.")
    assert all(block.tokens == pivot_tokens(kind, block.text) <= 24 for block in blocks)


@property_test
@given(st.sampled_from(KINDS), st.lists(st.text(max_size=9), min_size=1, max_size=12))
def test_packed_documents_never_exceed_a_block_and_none_is_lost(kind: str, texts: list[str]) -> None:
    texts = [f"Text {text}." for text in texts]
    blocks = prepared([document(n, text) for n, text in enumerate(texts)], kind, max_length=64)
    assert "\n\n".join(block.text for block in blocks) == "\n\n".join(texts)
    assert all(block.tokens == pivot_tokens(kind, block.text) <= 64 for block in blocks)


def test_a_long_document_is_read_whole_once_not_once_for_each_of_its_pieces() -> None:
    class Counting(TextTokenizer):
        read = 0

        def encode(self, texts: Sequence[str]) -> list[Tokens]:
            self.read += sum(map(len, texts))
            return super().encode(texts)

    tokenizer = Counting(shared("byte_level_bpe", CHATML), "pivot")
    text = " ".join(TEXT) * 60
    blocks = list(Preparation(tokenizer, None, 64).blocks([document(1, text)]))
    assert len(blocks) > 100
    assert "".join(block.text for block in blocks) == text
    assert tokenizer.read < 3 * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_short_documents_are_packed_into_blocks_with_a_blank_line_between(kind: str) -> None:
    texts = [f"Document {n}. {words(random.Random(n), 6)}" for n in range(40)]
    blocks = prepared([document(n, text) for n, text in enumerate(texts)], kind, max_length=128)
    assert "\n\n".join(block.text for block in blocks) == "\n\n".join(texts)
    assert len(blocks) < len(texts) / 1.5
    assert all(block.tokens == pivot_tokens(kind, block.text) <= 128 for block in blocks)
    alone = prepared([document(n, text) for n, text in enumerate(texts)], kind, max_length=512, packing=False)
    assert [block.text for block in alone] == texts
    assert [block.conversation for block in alone] == [f"d{n}" for n in range(40)]


@property_test
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.text(max_size=150))
def test_a_document_fits_every_tokenizer_that_is_named(kind: str, other: str, text: str) -> None:
    text = f"Text {text} the lazy dog. A lazy dog!"
    for packing in (False, True):
        blocks = prepared([document(0, text)], kind, max_length=24, others=[tokenizer_of(other)], packing=packing)
        check_nothing_is_lost(kind, blocks, text)
        longest = [max(pivot_tokens(one, block.text) for one in (kind, other)) for block in blocks]
        assert max(longest) <= 24
        assert min(longest[:-1], default=24) > 8  # nor is a piece much shorter than it may be


def test_packed_documents_fit_every_tokenizer_that_is_named() -> None:
    texts = [f"Document {n}. {'the lazy dog ' * (n % 4)}" for n in range(40)]
    documents = [document(n, text) for n, text in enumerate(texts)]
    blocks = prepared(documents, "byte_level_bpe", max_length=64, others=[tokenizer_of("unigram")])
    assert "\n\n".join(block.text for block in blocks) == "\n\n".join(texts)
    assert len(blocks) < len(texts)
    assert 40 < max(pivot_tokens("unigram", block.text) for block in blocks) <= 64


def test_dialogues_are_split_where_another_tokenizer_needs_it() -> None:
    pivot, other = "byte_level_bpe", "unigram"  # 3 and 10 tokens for each "the lazy dog"
    conversation = dialogue(0, *("Who sleeps?", "the lazy dog " * 5) * 6)
    room = pivot_tokens(other, chatml(conversation.messages[:4]))
    assert pivot_tokens(pivot, chatml(conversation.messages[:6])) <= room
    alone = prepared([conversation], pivot, max_length=room)
    both = prepared([conversation], pivot, max_length=room, others=[tokenizer_of(other)])
    assert [len(block.spans) for block in both] == [2, 2, 2]
    assert len(alone) < 3
    assert supervised(both) == supervised(alone) == answers(conversation)
    (cut,) = prepared(
        [dialogue(1, "Hi.", "the lazy dog " * 99)], pivot, max_length=96, others=[tokenizer_of(other)]
    )
    assert 84 < pivot_tokens(other, cut.text) <= 96
    assert pivot_tokens(pivot, cut.text) < 48


def test_a_document_of_one_token_that_nothing_precedes_is_dropped_and_counted() -> None:
    work = preparation("byte_level_bpe", packing=False)
    blocks = list(work.blocks([document(0, "Hello, how are you?"), document(1, "a"), document(2, "I am fine.")]))
    assert [block.conversation for block in blocks] == ["d0", "d2"]
    assert (work.report.kept, work.report.dropped) == (2, {"no supervised token": 1})


# The folder


def write(folder: Path, conversations: Sequence[Conversation], **settings: Any) -> list[Block]:
    work = preparation(**settings)
    blocks = list(work.blocks(conversations))
    write_dialogues(folder, blocks, work, {"data": "these"})
    return blocks


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues_file, "ROWS_PER_BATCH", 100)


@pytest.mark.usefixtures("small_batches")
def test_what_was_written_is_read_back_by_number_and_in_order(tmp_path: Path) -> None:
    documents = [document(n, f"Hello {n}, naïve 🙂") for n in range(250)]
    conversations = [*some_dialogues(), *documents]
    blocks = write(tmp_path / "dialogues", conversations, packing=False)
    dialogues = Dialogues(tmp_path / "dialogues")
    assert len(dialogues) == len(blocks) > 250
    assert list(dialogues) == blocks
    for number in [0, 1, 99, 100, 101, 199, 200, len(blocks) - 1]:
        assert dialogues[number] == blocks[number]
    assert dialogues.lengths.tolist() == [block.tokens for block in blocks]
    for outside in (len(blocks), -1):
        with pytest.raises(IndexError):
            dialogues[outside]


def test_the_same_data_gives_the_same_bytes_and_other_data_another_fingerprint(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, some_dialogues())
    write(tmp_path / "other", some_dialogues()[1:])
    first, second, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b", "other")
    )
    assert set(first) == {"blocks.arrow", "manifest.json"}
    assert first == second
    assert Dialogues(tmp_path / "a").fingerprint == Dialogues(tmp_path / "b").fingerprint
    assert Dialogues(tmp_path / "a").fingerprint != Dialogues(tmp_path / "other").fingerprint
    assert first != other


def test_the_manifest_holds_request_and_report(tmp_path: Path) -> None:
    work = preparation()
    blocks = work.blocks(some_dialogues())
    write_dialogues(tmp_path / "dialogues", blocks, work, {"data": ["abc"], "max_length": 96})
    manifest = Dialogues(tmp_path / "dialogues").manifest
    assert manifest["request"] == {"data": ["abc"], "max_length": 96}
    assert manifest["report"] == work.report.as_dict()
    assert manifest["report"]["blocks"] == len(Dialogues(tmp_path / "dialogues"))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_an_interrupted_preparation_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def some() -> Iterator[Block]:
        yield from prepared([document(n, f"Hello {n}.") for n in range(150)], packing=False)
        raise error("stop")

    with pytest.raises(error):
        write_dialogues(tmp_path / "dialogues", some(), preparation(), {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_not_in_the_way_and_what_another_makes_is_left_alone(tmp_path: Path) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    for process in (killed.pid, os.getppid()):
        (tmp_path / f"dialogues.{platform.node()}.{process}.tmp").mkdir()
        (tmp_path / f"dialogues.{platform.node()}.{process}.tmp" / "blocks.arrow").write_bytes(b"half")
    blocks = write(tmp_path / "dialogues", some_dialogues())
    assert {path.name for path in tmp_path.iterdir()} == {
        "dialogues",
        f"dialogues.{platform.node()}.{os.getppid()}.tmp",
    }
    assert list(Dialogues(tmp_path / "dialogues")) == blocks


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dialogues"):
        Dialogues(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(UserError, match="is not a folder of fusion-trainer dialogues"):
        Dialogues(tmp_path)
