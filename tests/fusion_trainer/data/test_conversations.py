"""Chat data of every format and container gives the same conversations; bad rows are reported by file and row."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import datasets
import pandas as pd
import pytest

from fusion_trainer.data.conversations import BAD_ROW, ROLES, Conversation, Message, conversations
from fusion_trainer.data.sources import open_source
from varm_common.errors import UserError

ANSWERS = ("2024-03-05", "  Grüße, 你好 🙂\n\nbye ")
SYSTEM, QUESTION, NEXT = "Be brief.", "Which day is it?", " 'Again', \"please\" \\ "
DIALOGUE = (
    Message("system", SYSTEM),
    Message("user", QUESTION),
    Message("assistant", ANSWERS[0]),
    Message("user", NEXT),
    Message("assistant", ANSWERS[1]),
)
EXCHANGE = (Message("user", QUESTION), Message("assistant", ANSWERS[0]))


def turns(role: str, content: str, names: tuple[str, str, str]) -> list[dict[str, str]]:
    """``DIALOGUE`` as dictionaries; ``names`` are those of system, user and assistant."""
    name_of = dict(zip(("system", "user", "assistant"), names, strict=True))
    return [{role: name_of[message.role], content: message.content} for message in DIALOGUE]


OPENAI = turns("role", "content", ("system", "user", "assistant"))
FORMATS: dict[str, tuple[dict[str, Any], tuple[Message, ...], str | None]] = {
    "ShareGPT": ({"conversations": turns("from", "value", ("system", "human", "gpt"))}, DIALOGUE, None),
    "ShareGPT, other names": (
        {"conversations": turns("from", "value", ("system", "user", "assistant"))},
        DIALOGUE,
        None,
    ),
    "OpenAI": ({"messages": OPENAI}, DIALOGUE, None),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWERS[0]}, EXCHANGE, None),
    "lists of messages": (
        {"prompt": OPENAI[:4], "completion": OPENAI[4:]},
        (*DIALOGUE[:2], Message("assistant", ANSWERS[0], learn=False), *DIALOGUE[3:]),
        None,
    ),
    "messages with ShareGPT keys": (
        {"messages": turns("from", "value", ("system", "human", "gpt"))},
        DIALOGUE,
        None,
    ),
    "a mixture of keys": (
        {"conversation": turns("role", "value", ("developer", "User", "model"))},
        DIALOGUE,
        None,
    ),
    "Alpaca": ({"instruction": QUESTION, "input": "", "output": ANSWERS[0]}, EXCHANGE, None),
    "Alpaca with everything": (
        {"instruction": NEXT, "output": ANSWERS[1], "history": [[QUESTION, ANSWERS[0]]], "system": SYSTEM},
        DIALOGUE,
        None,
    ),
    "a system column": ({"messages": OPENAI[1:], "system": SYSTEM}, DIALOGUE, None),
    "a system column that repeats the turn": ({"messages": OPENAI, "system_prompt": SYSTEM}, DIALOGUE, None),
    "an empty system column": ({"prompt": QUESTION, "completion": ANSWERS[0], "system": ""}, EXCHANGE, None),
    "text": ({"text": ANSWERS[0]}, (), ANSWERS[0]),
}


def as_json(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_jsonl(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def as_folder(path: Path, rows: list[Any]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def as_folder_of_splits(path: Path, rows: list[Any]) -> Path:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


def as_folder_of_parquet(path: Path, rows: list[Any]) -> Path:
    path.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return path


Writer = Callable[[Path, list[Any]], Path]
CONTAINERS = (as_json, as_jsonl, as_parquet, as_folder, as_folder_of_splits, as_folder_of_parquet)
FOLDERS_SLOW = [*CONTAINERS[:3], *(pytest.param(write, marks=pytest.mark.slow) for write in CONTAINERS[3:])]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def read(
    *paths: Path, skipped: Counter[str] | None = None, unused: Counter[str] | None = None
) -> list[Conversation]:
    return list(conversations((open_source(str(path)) for path in paths), skipped, unused))


def answer_of(row: dict[str, Any], path: Path, write: "Writer" = as_jsonl) -> Message:
    """The last message of a row, read from a file."""
    (conversation,) = read(write(path / "chats", [row]))
    return conversation.messages[-1]


def refusal(*paths: Path) -> str:
    with pytest.raises(UserError) as error:
        read(*paths)
    return str(error.value)


@pytest.mark.parametrize("write", FOLDERS_SLOW)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_container_gives_the_same_conversations(
    name: str, write: Writer, tmp_path: Path
) -> None:
    row, messages, text = FORMATS[name]
    path = write(tmp_path / "chats", [row, {**row}])
    first, second = read(path)
    assert (first.messages, first.text) == (second.messages, second.text) == (messages, text)
    assert (first.id, second.id) == ("1", "2")
    assert first.where.startswith(path.name)
    assert first.where.endswith(" 1")


@pytest.mark.parametrize("write", CONTAINERS)
def test_answers_that_look_like_dates_numbers_or_json_stay_strings(write: Writer, tmp_path: Path) -> None:
    answers = ["2024-03-05", "2024-03-05T10:00:00Z", "12", "true", "null", '{"a": 1}', "[1, 2]", "1e3", "12:30"]
    path = write(tmp_path / "chats", [{"prompt": "What?", "completion": answer} for answer in answers])
    assert [conversation.messages[1].content for conversation in read(path)] == answers


def test_a_folder_whose_strings_datasets_reads_as_timestamps_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    as_jsonl(folder / "train", [{"prompt": "Which day?", "completion": "2024-03-05"}])
    message = refusal(folder)
    assert str(folder) in message
    assert "has read strings as timestamps" in message


@pytest.mark.parametrize("write", [as_json, as_jsonl])
def test_other_columns_may_hold_anything(write: Writer, tmp_path: Path) -> None:
    others: list[Any] = [1, "one", None, [1, "a", {}], {"a": {"b": [1]}}, True, 2.5]
    rows = [{"messages": OPENAI, "meta": other, "tags": [other]} for other in others]
    rows[0]["messages"] = [{**turn, "weight": 1, "name": None} for turn in OPENAI]
    assert [conversation.messages for conversation in read(write(tmp_path / "chats", rows))] == [DIALOGUE] * 7


def test_a_folder_that_was_saved_with_a_format_for_training_has_all_columns_as_they_are(tmp_path: Path) -> None:
    rows = [{"messages": OPENAI, "weight": 1, "input_ids": [1, 2]}]
    for number, columns in enumerate((["input_ids"], None)):
        dataset = datasets.Dataset.from_list(rows).with_format("torch", columns=columns)
        dataset.save_to_disk(str(tmp_path / str(number)))
        assert [conversation.messages for conversation in read(tmp_path / str(number))] == [DIALOGUE]


def test_rows_are_known_by_their_id_or_their_number(tmp_path: Path) -> None:
    ids: list[dict[str, Any]] = [{"id": "a-1"}, {"id": 17}, {"conversation_id": "c"}, {"id": None}, {}]
    path = as_jsonl(tmp_path / "chats", [{"text": "Hello.", **columns} for columns in ids])
    assert [conversation.id for conversation in read(path)] == ["a-1", "17", "c", "4", "5"]


def test_columns_that_are_null_are_as_if_not_there(tmp_path: Path) -> None:
    path = as_parquet(
        tmp_path / "chats", [{"messages": OPENAI, "text": None}, {"messages": None, "text": "Hello."}]
    )
    first, second = read(path)
    assert (first.messages, first.text) == (DIALOGUE, None)
    assert (second.messages, second.text) == ((), "Hello.")


@pytest.mark.parametrize("write", [as_json, as_jsonl])
def test_a_byte_order_mark_at_the_head_of_a_file_is_no_part_of_it(write: Writer, tmp_path: Path) -> None:
    path = write(tmp_path / "chats", [{"text": "Hello."}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [conversation.text for conversation in read(path)] == ["Hello."]


def test_a_json_file_may_hold_lines_and_a_jsonl_file_an_array(tmp_path: Path) -> None:
    rows = [{"text": "One."}, {"text": "Two."}]
    lines = as_jsonl(tmp_path / "lines", rows).rename(tmp_path / "lines.json")
    array = as_json(tmp_path / "array", rows).rename(tmp_path / "array.jsonl")
    assert [[c.text for c in read(path)] for path in (lines, array)] == [["One.", "Two."]] * 2


def test_several_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    first = as_jsonl(tmp_path / "b", [{"text": "One."}])
    second = as_parquet(tmp_path / "a", [{"text": "Two."}])
    assert [conversation.text for conversation in read(first, second)] == ["One.", "Two."]


def test_a_column_of_timestamps_beside_the_conversation_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    when = pd.to_datetime(["2024-03-05"])
    pd.DataFrame({"prompt": ["When?"], "completion": ["2024-03-05"], "timestamp": when}).to_parquet(path)
    (conversation,) = read(path)
    assert conversation.messages[1] == Message("assistant", "2024-03-05")


def test_a_tool_turn_may_stand_between_answers(tmp_path: Path) -> None:
    roles = ["system", "human", "gpt", "tool", "gpt", "human", "gpt"]
    path = as_jsonl(tmp_path / "c", [{"conversations": [{"from": role, "value": "x"} for role in roles]}])
    (conversation,) = read(path)
    expected = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [message.role for message in conversation.messages] == expected


MARKS: list[tuple[dict[str, Any], bool]] = [
    ({"weight": 0}, False),
    ({"weight": 0.0}, False),
    ({"weight": 1.0}, True),
    ({"train": False}, False),
    ({"train": True}, True),
    ({"loss": False}, False),
    ({"loss": True}, True),
    ({"loss_mask": 0}, False),
    ({"loss_mask": 1}, True),
    ({"loss_scale": 0.0}, False),
    ({"masked": True}, False),
    ({"masked": False}, True),
    ({"weight": 0, "train": False, "masked": 1}, False),
    ({"weight": None}, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
@pytest.mark.parametrize(("mark", "learnt"), MARKS)
def test_an_answer_that_is_marked_is_rendered_but_not_learnt(
    mark: dict[str, Any], learnt: bool, write: Writer, tmp_path: Path
) -> None:
    assert answer_of(with_answer(**mark), tmp_path, write) == Message("assistant", "Hello.", learn=learnt)


def test_a_mark_of_the_row_holds_for_all_its_turns(tmp_path: Path) -> None:
    (conversation,) = read(as_jsonl(tmp_path / "chats", [{"messages": OPENAI, "weight": 0, "system": SYSTEM}]))
    assert [message.content for message in conversation.messages] == [message.content for message in DIALOGUE]
    assert not any(message.learn for message in conversation.messages)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", ["Hello.", "", None])
def test_reasoning_goes_to_the_template_under_one_name(key: str, content: str | None, tmp_path: Path) -> None:
    answer = answer_of(with_answer(**{key: " Because.\n", "content": content}), tmp_path)
    assert answer == Message("assistant", content or "", extra={"reasoning_content": " Because.\n"})


def test_empty_reasoning_is_as_if_not_there(tmp_path: Path) -> None:
    assert answer_of(with_answer(reasoning="", thinking=None, tool_calls=[]), tmp_path).extra == {}
    answer = answer_of(with_answer(reasoning_content="", thinking="Hm."), tmp_path)
    assert answer.extra == {"reasoning_content": "Hm."}


ARGUMENTS = {"city": "Köln", "days": [1, 2], "unit": "°C"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLED: dict[str, dict[str, Any]] = {
    "OpenAI": {"tool_calls": [{**CALL, "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]},
    "arguments as an object": {"tool_calls": [CALL]},
    "a flat call": {"tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
    "calls in a string": {"tool_calls": json.dumps([CALL])},
    "one call of the older form": {"function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
    "ShareGPT": {"role": "function_call", "content": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
}


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
@pytest.mark.parametrize("name", CALLED)
def test_calls_go_to_the_template_in_one_form_with_arguments_as_objects(
    name: str, write: Writer, tmp_path: Path
) -> None:
    answer = answer_of(with_answer(**{"content": None, **CALLED[name]}), tmp_path, write)
    assert answer == Message("assistant", "", extra={"tool_calls": [CALL]})


def test_a_call_keeps_its_id_and_its_answer_keeps_the_name(tmp_path: Path) -> None:
    row = with_answer(tool_calls=[{"id": "c1", **CALL, "function": {"name": "weather", "arguments": ""}}])
    row["messages"] += [{"role": "tool", "content": "12", "tool_call_id": "c1", "name": "weather"}]
    (conversation,) = read(as_jsonl(tmp_path / "chats", [row]))
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}}
    assert conversation.messages[1:] == (
        Message("assistant", "Hello.", extra={"tool_calls": [call]}),
        Message("tool", "12", extra={"tool_call_id": "c1", "name": "weather"}),
    )


def test_calls_of_a_table_have_no_keys_of_other_calls(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "a"}}]
    answer = answer_of(with_answer(tool_calls=calls), tmp_path, as_parquet)
    assert [call["function"] for call in answer.extra["tool_calls"]] == calls


SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": TOOLS},
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA])},
        {"tools": [json.dumps(TOOLS[0])]},
        {"functions": [SCHEMA], "tools": None},
    ],
)
def test_tools_go_to_the_template_in_one_form(columns: dict[str, Any], tmp_path: Path) -> None:
    (conversation,) = read(as_jsonl(tmp_path / "chats", [{"messages": OPENAI, **columns}]))
    assert (conversation.messages, conversation.tools) == (DIALOGUE, TOOLS)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_none(tools: Any, tmp_path: Path) -> None:
    (conversation,) = read(as_jsonl(tmp_path / "chats", [{"messages": OPENAI, "tools": tools}]))
    assert conversation.tools is None


def test_the_input_of_an_instruction_follows_after_two_newlines(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "chats", [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    (conversation,) = read(path)
    assert conversation.messages == (Message("user", "Add.\n\n1, 2"), Message("assistant", "3"))


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_parts_of_text_are_joined(write: Writer, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "output_text", "text": "you.\n"}]
    row = chat(("user", parts), ("assistant", parts))
    assert answer_of(row, tmp_path, write) == Message("assistant", "Hello, you.\n")


def test_a_column_of_another_format_that_only_repeats_the_turns_is_counted(tmp_path: Path) -> None:
    rendered = "".join(f"<|{message.role}|>\n{message.content.strip()}\n" for message in DIALOGUE)
    repeated = {
        "prompt": QUESTION,
        "instruction": QUESTION,
        "completion": ANSWERS[1],
        "text": rendered,
        "output": "",
    }
    unused = Counter[str]()
    path = as_jsonl(tmp_path / "chats", [{"messages": OPENAI, **repeated}])
    assert [conversation.messages for conversation in read(path, unused=unused)] == [DIALOGUE]
    assert unused == {"prompt": 1, "instruction": 1, "completion": 1, "text": 1}


def test_the_text_column_of_alpaca_only_repeats_the_other_columns(tmp_path: Path) -> None:
    """As in tatsu-lab/alpaca: the text has a header between the instruction and the input."""
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    text = "### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:\n2"
    assert answer_of({**row, "text": text}, tmp_path) == Message("assistant", "2")
    other = as_jsonl(tmp_path / "other", [{**row, "text": text.replace("1 and 1", "1 and 2")}])
    assert "has both `instruction/output` and `text`" in refusal(other)


def test_keys_that_were_not_used_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": 1,
            "source": "web",
            "score": 0,
            "tags": [],
            "license": "",
            **with_answer(name="Bob", time=3, weight=1),
        },
        {"id": 2, "source": [{"from": "web", "to": "us"}], "language": None, "text": "Hello.", "label": 2},
        {"source": "web", "system": "Be brief.", "tools": TOOLS, **with_answer(time=4, refusal=None, train=False)},
        {"source": "web", **with_answer(time=5, weight=7)},
    ]
    unused = Counter[str]()
    assert len(read(as_jsonl(tmp_path / "chats", rows), skipped=Counter(), unused=unused)) == 3
    assert unused == {"source": 3, "score": 1, "label": 1, "time (of a turn)": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"text": "Hello."}]}', "chats.json, line 1: missing keys: has 'data'"),
        ('{\n  "data": [\n    {"text": "Hello."}\n  ]\n}\n', "chats.json, row 1: missing keys: has 'data'"),
        ('{\n  "text": "One."\n}\n{\n  "text": "Two."\n}\n', "chats.json is not JSON: Extra data: line 4"),
        (
            '["Hello.", "Bye."]',
            "chats.json, row 1: the row is a str, not an object\n    2 rows of this kind, also",
        ),
        ("7", "chats.json, line 1: the row is a int, not an object"),
        ('"Hello."', "chats.json, line 1: the row is a str, not an object"),
        ("null", "chats.json, line 1: the row is a NoneType, not an object"),
        ("[[[", "chats.json is not JSON"),
        ("[" * 200_000, "chats.json is not JSON"),
        ("text\nHello.\nBye.\n", "chats.json, line 1: not JSON: Expecting value: line 1 column 1"),
    ],
)
def test_json_of_the_wrong_shape_is_a_sentence(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(content)
    assert message in refusal(path)


def test_one_conversation_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps({"messages": OPENAI}, indent=2))
    assert [conversation.messages for conversation in read(path)] == [DIALOGUE]


def test_turns_of_a_table_may_have_timestamps(tmp_path: Path) -> None:
    when = pd.to_datetime("2024-03-05")
    path = as_parquet(tmp_path / "chats", [{"conversation": [{**turn, "timestamp": when} for turn in OPENAI]}])
    unused = Counter[str]()
    assert [conversation.messages for conversation in read(path, unused=unused)] == [DIALOGUE]
    assert unused == {"timestamp (of a turn)": 5}


def chat(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def with_answer(**keys: Any) -> dict[str, Any]:
    """A question and an answer that has more keys."""
    row = chat(("user", "Hi."), ("assistant", "Hello."))
    row["messages"][1].update(keys)
    return row


EXCHANGE_ROW = {"prompt": QUESTION, "completion": ANSWERS[0]}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no known column": ({"question": "a", "answer": "b"}, "missing keys: has 'question', 'answer'"),
    "nothing in it": ({}, "missing keys: has none"),
    "a number": (7, "the row is a int, not an object"),
    "a string": ("hello", "the row is a str, not an object"),
    "a list": (["hello"], "the row is a list, not an object"),
    "null": (None, "not an object"),
    "no completion": ({"prompt": "Hi."}, "no `completion`"),
    "no prompt": ({"completion": "Hi."}, "no `prompt`"),
    "string and list": ({"prompt": "Hi.", "completion": OPENAI[2:3]}, "both must be strings, or both lists"),
    "a completion that is a number": ({"prompt": "1 + 1?", "completion": 2}, "both must be strings"),
    "no turns": ({"messages": []}, "`messages` is empty"),
    "no ShareGPT turns": ({"conversations": []}, "`conversations` is empty"),
    "turns in a string": ({"messages": "user: hello"}, "`messages` is a str, not a list"),
    "turns in an object": ({"messages": {"role": "user"}}, "`messages` is a dict, not a list"),
    "a turn that is a string": ({"messages": ["hello"]}, "turn 1 is a str, not an object"),
    "no content": ({"messages": [{"role": "user"}]}, "turn 1 has no `content`"),
    "no role": ({"messages": [{"content": "Hi."}]}, "turn 1 has no `role`"),
    "no sender": ({"conversations": [{"value": "Hi."}]}, "turn 1 has no `role` or `from`"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 has no `content` or `value`"),
    "null content": (chat(("user", "Hi."), ("assistant", None)), "turn 2 has no `content`"),
    "unknown role": (chat(("user", "Hi."), ("robot", "Hello.")), "turn 2 has the unknown role 'robot'"),
    "a role that is a list": (chat((["user"], "Hi.")), "turn 1 has the unknown role ['user']"),
    "empty message": (chat(("user", "Hi."), ("assistant", "")), "the content of turn 2 is empty"),
    "blank message": (chat(("user", " \n"), ("assistant", "Hi.")), "the content of turn 1 is empty"),
    "an image in the content": (
        chat(("user", [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "x"}}])),
        "the content of turn 1 has a part of type 'image_url': only text can be used",
    ),
    "a list of strings as content": (chat(("user", ["Hi."])), "the content of turn 1 has a part of type 'str'"),
    "empty parts": (chat(("user", [])), "the content of turn 1 is empty"),
    "content that is a number": (chat(("user", 12)), "the content of turn 1 is a int, not a string"),
    "two users in a row": (chat(("user", "Hi."), ("user", "Hello?")), "two user turns in a row: turns 1 and 2"),
    "two answers in a row": (
        chat(("user", "Hi."), ("assistant", "a"), ("assistant", "b")),
        "two assistant turns in a row: turns 2 and 3",
    ),
    "text that is a list": ({"text": ["a"]}, "`text` is a list, not a string"),
    "empty text": ({"text": ""}, "`text` is empty"),
    "two names of a role": (with_answer(**{"from": "human"}), "`role` and `from` of turn 2 contradict each other"),
    "two contents": (with_answer(value="Bye."), "`content` and `value` of turn 2 contradict each other"),
    "half a weight": (
        with_answer(weight=0.5),
        "`weight` of turn 2 is 0.5, but can only be 1 (the answer is learnt) or 0 (it is not)",
    ),
    "a negative weight": (with_answer(weight=-1), "`weight` of turn 2 is -1"),
    "a weight in a string": (with_answer(weight="0"), "`weight` of turn 2 is '0'"),
    "a mask of tokens": (with_answer(loss_mask=[0, 1, 1]), "`loss_mask` of turn 2 is [0, 1, 1]"),
    "a mask of the row": ({"messages": OPENAI, "loss_mask": [0, 1]}, "`loss_mask` of the row is [0, 1]"),
    "a weight of the row": ({"messages": OPENAI, "weight": 0.3}, "`weight` of the row is 0.3"),
    "marks that contradict": (
        with_answer(weight=0, train=True),
        "`weight` and `train` of turn 2 contradict each other",
    ),
    "marks of opposite sense": (with_answer(loss=True, masked=True), "`loss` and `masked` of turn 2 contradict"),
    "a mask that may mean either": (with_answer(mask=True), "turn 2 has `mask`: it is unclear whether"),
    "parts of an answer": (with_answer(train_detail=[{"begin_offset": 0}]), "turn 2 has `train_detail`"),
    "reasoning that differs": (
        with_answer(reasoning="a", thinking="b"),
        "`reasoning` and `thinking` of turn 2 contradict",
    ),
    "reasoning that is a list": (with_answer(reasoning=["a"]), "`reasoning_content` of turn 2 is a list"),
    "a user who reasons": (
        {"messages": [{"role": "user", "content": "Hi.", "reasoning": "Hm."}]},
        "turn 1 has `reasoning_content`, but its role is user, not assistant",
    ),
    "a call without a name": (with_answer(tool_calls=[{"id": "1"}]), "a call of turn 2 has no `name`"),
    "calls that are no JSON": (with_answer(tool_calls="f(x)"), "a call of turn 2 is not JSON"),
    "arguments that are no JSON": (
        with_answer(tool_calls=[{"function": {"name": "f", "arguments": "{x"}}]),
        "`arguments` of a call of turn 2 is not JSON",
    ),
    "arguments that are a list": (
        with_answer(function_call={"name": "f", "arguments": "[1]"}),
        "`arguments` of a call of turn 2 is a list, not an object",
    ),
    "half a surrogate pair in a call": (
        with_answer(tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}]),
        "the tools or calls cannot be written as JSON",
    ),
    "a call with a number that JSON does not have": (
        with_answer(tool_calls=[{"name": "f", "arguments": {"x": float("nan")}}]),
        "the tools or calls cannot be written as JSON",
    ),
    "a call role without a call": (
        {"conversations": [{"from": "function_call", "value": "I call it."}]},
        "a call of turn 1 is not JSON",
    ),
    "tools that are no JSON": ({"messages": OPENAI, "tools": "search"}, "`tools` is not JSON"),
    "tools that are numbers": ({"messages": OPENAI, "tools": [1]}, "`tools` is not a list of functions"),
    "tools that are an object": (
        {"messages": OPENAI, "tools": {"name": "f"}},
        "`tools` is not a list of functions",
    ),
    "tools that differ": (
        {"messages": OPENAI, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        "`tools` and `functions` of the row contradict each other",
    ),
    "another system prompt": (
        {"messages": OPENAI, "system": "Be long."},
        "the system column and the system turn contradict each other",
    ),
    "a system prompt that is a list": ({**EXCHANGE_ROW, "system": ["a"]}, "the system column is a list"),
    "a document with a system prompt": ({"text": "Hello.", "system": "Be brief."}, "`text` is learnt as a whole"),
    "a document with tools": ({"text": "Hello.", "tools": '[{"name": "f"}]'}, "`text` is learnt as a whole"),
    "a document that is not learnt": ({"text": "Hello.", "train": False}, "`text` is learnt as a whole"),
    "two lists of turns": (
        {"messages": OPENAI, "conversations": OPENAI},
        "has both `conversations` and `messages`, and one of them would be lost",
    ),
    "turns and a document": ({"messages": OPENAI, "text": "Other."}, "has both `messages` and `text`"),
    "a document and a prompt": ({"text": "Hello.", "prompt": "Greet."}, "has both `text` and `prompt`"),
    "turns and a history": ({"messages": OPENAI, "history": [["a", "b"]]}, "has both `messages` and `history`"),
    "a document that is no rendering": (
        {"prompt": "Hi.", "completion": "Bye.", "text": "Bye. Hi."},
        "has both `prompt/completion` and `text`",
    ),
    "two answers to a prompt": ({**EXCHANGE_ROW, "output": "b"}, "has both `prompt/completion` and `output`"),
    "turns in another column": (
        {"messages": OPENAI, "conversation_b": [{"role": "user", "content": "Hi."}]},
        "the row has turns in `conversation_b`, which would be lost",
    ),
    "a preference": ({"prompt": "Hi.", "chosen": "a", "rejected": "b"}, "the row has `chosen`: preferences"),
    "a preference beside turns": ({"messages": OPENAI, "rejected": OPENAI}, "the row has `rejected`: preferences"),
    "an answer labelled bad": ({**EXCHANGE_ROW, "label": False}, "the row has `label`: preferences"),
    "images": ({"messages": OPENAI, "images": ["a.png"]}, "the row has `images`: only text can be used"),
    "images of a turn": (with_answer(images=["a.png"]), "turn 2 has `images`: only text can be used"),
    "no output": ({"instruction": "Add."}, "no `output`"),
    "no instruction": ({"input": "1", "output": "2"}, "no `instruction`"),
    "an empty output": ({"instruction": "Add.", "output": ""}, "`output` is empty"),
    "a history of no pairs": (
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "`history` is not a list of pairs",
    ),
    "half a surrogate pair": ({"prompt": "Hi.", "completion": "\ud83d"}, "`completion` is not valid Unicode text"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("container", ["json", "jsonl"])
def test_a_bad_row_is_named_with_file_and_row_and_reason(name: str, container: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[name]
    rows = [{"text": "Fine."}, row, {"text": "Fine, too."}]
    path = tmp_path / f"chats.{container}"
    path.write_text(json.dumps(rows) if container == "json" else "\n".join(map(json.dumps, rows)))
    message = refusal(path)
    assert "the data has 1 bad row:" in message
    assert f"chats.{container}, {'row' if container == 'json' else 'line'} 2: " in message
    assert reason in message
    assert "--bad-rows skip" in message


def test_all_bad_rows_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    some = list(BAD_ROWS.values())[:9]
    first = as_jsonl(tmp_path / "first", [{"text": "Fine."}, *(row for row, _ in some)])
    second = as_json(tmp_path / "second", [{"text": "Fine."}, *(row for row, _ in some)])
    message = refusal(first, second)
    assert "the data has 18 bad rows:" in message
    for number, (_, reason) in enumerate(some, 2):
        assert reason in message
        assert f"first.jsonl, line {number}: " in message
        assert f"2 rows of this kind, also second.json, row {number}\n" in message


def test_one_kind_of_bad_row_is_reported_once_with_a_count_and_three_examples(tmp_path: Path) -> None:
    fine = chat(("user", "Hi."), ("assistant", "Hello."))["messages"]
    robots = [{"messages": [*fine * n, {"role": "robot", "content": "x"}]} for n in range(40)]
    rows = [row for robot in robots for row in (robot, {"text": ""})]
    message = refusal(as_jsonl(tmp_path / "chats", [*rows, {"text": 7}]))
    assert message.splitlines() == [
        "the data has 81 bad rows:",
        f"  chats.jsonl, line 1: turn 1 has the unknown role 'robot'; known are {', '.join(ROLES)}",
        "    40 rows of this kind, also chats.jsonl, line 3; chats.jsonl, line 5 …",
        "  chats.jsonl, line 2: `text` is empty",
        "    40 rows of this kind, also chats.jsonl, line 4; chats.jsonl, line 6 …",
        "  chats.jsonl, line 81: `text` is a int, not a string",
        "Correct them, or leave them out with --bad-rows skip.",
    ]


def test_of_very_many_kinds_of_bad_rows_the_first_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    message = refusal(as_jsonl(tmp_path / "chats", [{letter * 2: 1} for letter in ascii_letters]))
    assert "the data has 52 bad rows:" in message
    assert "line 20: " in message
    assert "line 21: " not in message
    assert "… and 32 more" in message


def test_reading_does_not_go_on_for_ever_where_every_row_is_bad(tmp_path: Path) -> None:
    paths = [as_jsonl(tmp_path / name, [{"text": ""}] * 1500) for name in "ab"]
    assert "the data has 1000 bad rows:" in refusal(*paths)


def test_a_line_that_is_not_json_is_named_by_its_line_blank_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "Fine."}\n\n\n{"text": "Broken}\n{"text": "Fine."}\n{"text": 1,}\n')
    message = refusal(path)
    assert "chats.jsonl, line 4: not JSON" in message
    assert "chats.jsonl, line 6: not JSON" in message


def test_bytes_that_are_not_utf_8_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"text": "Fine."}\n{"text": "Gr\xfc\xdfe"}\n')
    assert "chats.jsonl, line 2: not JSON" in refusal(path)


def test_an_array_that_is_not_json_is_named_with_the_line_of_the_mistake(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text('[\n{"text": "Fine."},\n{"text": "Broken"\n')
    message = refusal(path)
    assert "chats.json is not JSON" in message
    assert "line 4" in message


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "One."}, *(row for row, _ in BAD_ROWS.values()), {"text": "Two."}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    skipped = Counter[str]()
    kept = read(path, skipped=skipped)
    assert [conversation.text for conversation in kept] == ["One.", "Two."]
    assert [conversation.id for conversation in kept] == ["1", str(len(rows))]
    assert skipped == {BAD_ROW: len(BAD_ROWS) + 1}


def test_bad_rows_of_a_parquet_file_are_named_too(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "chats", [chat(("user", "Hi."), ("robot", "Hello."))])
    assert "chats.parquet, row 1: turn 2 has the unknown role 'robot'" in refusal(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_missing_file_is_reported_with_the_files_beside_it(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"chats{suffix}").touch()
    message = refusal(tmp_path / f"chat{suffix}")
    assert f"no file `{tmp_path / f'chat{suffix}'}`" in message
    assert f"chats{suffix}" in message


def test_what_is_neither_file_nor_folder_nor_on_the_hub_is_reported(tmp_path: Path) -> None:
    assert "nobody/no-such-dataset" in refusal(Path("nobody/no-such-dataset"))
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    path.write_text("not a table")
    assert f"cannot read the file `{path}`" in refusal(path)


def test_a_file_of_another_kind_is_not_reported_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    path.touch()
    message = refusal(path)
    assert f"cannot read the file `{path}`: only .json, .jsonl, .parquet and .arrow are known" in message


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = as_folder_of_splits(tmp_path / "chats", [{"text": "Hello."}])
    with pytest.raises(UserError, match=r"cannot read the folder .*chats.*validation"):
        open_source(str(path), split="validation")


@pytest.mark.parametrize("content", [b"", b"  \n \n", b"[]"])
def test_an_empty_file_has_no_conversations(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_bytes(content)
    assert read(path) == []


@pytest.mark.parametrize("write", [as_json, as_jsonl, as_parquet])
def test_a_source_is_known_by_its_content_and_not_by_its_name(write: Writer, tmp_path: Path) -> None:
    rows = [{"text": "One."}, {"text": "Two."}]
    same = [open_source(str(write(tmp_path / name, rows))).fingerprint for name in ("a", "b")]
    other = open_source(str(write(tmp_path / "c", rows[::-1]))).fingerprint
    assert same[0] == same[1] != other


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    assert [c.text for c in read(as_parquet(tmp_path / "chats", [{"text": "One."}]))] == ["One."]
    assert [c.text for c in read(as_parquet(tmp_path / "chats", [{"text": "Another."}]))] == ["Another."]
