"""Chat data of every format and container gives the same conversations; every bad row is told, by file and row."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from fusion_trainer.conversations import BAD_ROW, Conversation, Message, conversations, open_source
from fusion_trainer.errors import FusionError

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
    "lists of messages": ({"prompt": OPENAI[:4], "completion": OPENAI[4:]}, DIALOGUE, None),
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def read(*paths: Path, skipped: Counter[str] | None = None) -> list[Conversation]:
    return list(conversations((open_source(str(path)) for path in paths), skipped))


def refusal(*paths: Path) -> str:
    with pytest.raises(FusionError) as error:
        read(*paths)
    return str(error.value)


@pytest.mark.parametrize("write", CONTAINERS)
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


def chat(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no known column": ({"question": "a", "answer": "b"}, "missing keys: has 'question', 'answer'"),
    "nothing in it": ({}, "missing keys: has none"),
    "a number": (7, "a int, not an object"),
    "a string": ("hello", "a str, not an object"),
    "a list": (["hello"], "a list, not an object"),
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
    "ShareGPT keys among messages": ({"messages": [{"from": "human", "value": "Hi."}]}, "turn 1 has no `role`"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 has no `value`"),
    "null content": (chat(("user", "Hi."), ("assistant", None)), "turn 2 has no `content`"),
    "unknown role": (chat(("user", "Hi."), ("robot", "Hello.")), "turn 2 has the unknown role 'robot'"),
    "a role that is a list": (chat((["user"], "Hi.")), "turn 1 has the unknown role ['user']"),
    "empty message": (chat(("user", "Hi."), ("assistant", "")), "`content` of turn 2 is empty"),
    "blank message": (chat(("user", " \n"), ("assistant", "Hi.")), "`content` of turn 1 is empty"),
    "content in parts": (
        chat(("user", [{"type": "text", "text": "Hi."}])),
        "`content` of turn 1 is a list, not a str",
    ),
    "content that is a number": (chat(("user", 12)), "`content` of turn 1 is a int, not a string"),
    "two users in a row": (chat(("user", "Hi."), ("user", "Hello?")), "two user turns in a row: turns 1 and 2"),
    "two answers in a row": (
        chat(("user", "Hi."), ("assistant", "a"), ("assistant", "b")),
        "two assistant turns in a row: turns 2 and 3",
    ),
    "text that is a list": ({"text": ["a"]}, "`text` is a list, not a string"),
    "empty text": ({"text": ""}, "`text` is empty"),
    "a call of a tool": (
        {"messages": [{"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "1"}]}]},
        "turn 1 has `tool_calls`, which is not rendered",
    ),
    "half a surrogate pair": ({"prompt": "Hi.", "completion": "\ud83d"}, "`completion` is no Unicode text"),
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


def test_all_bad_rows_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    some = list(BAD_ROWS.values())[:9]
    first = as_jsonl(tmp_path / "first", [{"text": "Fine."}, *(row for row, _ in some)])
    second = as_json(tmp_path / "second", [{"text": "Fine."}, *(row for row, _ in some)])
    message = refusal(first, second)
    assert "the data has 18 bad rows:" in message
    for number, (_, reason) in enumerate(some, 2):
        assert message.count(reason) >= 2
        assert f"first.jsonl, line {number}: " in message
        assert f"second.json, row {number}: " in message


def test_of_very_many_bad_rows_the_first_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    message = refusal(as_jsonl(tmp_path / "chats", [{"text": ""}] * 57))
    assert "the data has 57 bad rows:" in message
    assert "line 20: " in message
    assert "line 21: " not in message
    assert "… and 37 more" in message


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
def test_a_missing_file_is_told_with_what_lies_beside_it(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"chats{suffix}").touch()
    message = refusal(tmp_path / f"chat{suffix}")
    assert f"no file `{tmp_path / f'chat{suffix}'}`" in message
    assert f"chats{suffix}" in message


def test_what_is_neither_file_nor_folder_nor_on_the_hub_is_told(tmp_path: Path) -> None:
    assert "nobody/no-such-dataset" in refusal(Path("nobody/no-such-dataset"))
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    path.write_text("not a table")
    assert f"cannot read the file `{path}`" in refusal(path)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = as_folder_of_splits(tmp_path / "chats", [{"text": "Hello."}])
    with pytest.raises(FusionError, match=r"cannot read the folder .*chats.*validation"):
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
