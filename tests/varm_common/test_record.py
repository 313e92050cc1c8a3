"""A record: an output is made once, and never taken for another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from varm_common.errors import UserError
from varm_common.record import Record

IDENTITY = {"format": "scores", "model": "a", "seed": 3}


def refused(record: Record) -> str:
    with pytest.raises(UserError) as error:
        record.read()
    return str(error.value)


def test_a_record_is_read_with_its_results(tmp_path: Path) -> None:
    record = Record(tmp_path / "scores.json", IDENTITY, "Give another --output")
    assert record.read() is None
    record.write(loss=0.5)
    assert record.read() == {**IDENTITY, "loss": 0.5}


def test_other_settings_are_shown_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    Record(path, IDENTITY, "").write()
    before = path.read_bytes()
    message = refused(Record(path, {**IDENTITY, "seed": 4}, "Give another --output"))
    assert message.splitlines() == [
        f"`{path}` was made with other settings:",
        "        wanted  found",
        "  seed  4       3",
        "Give another --output.",
    ]
    assert path.read_bytes() == before


def test_only_the_compared_part_has_to_agree(tmp_path: Path) -> None:
    def model_only(identity: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": identity["model"]}

    path = tmp_path / "scores.json"
    Record(path, IDENTITY, "").write()
    assert Record(path, {**IDENTITY, "seed": 4}, "", model_only).read() == IDENTITY
    assert "\n  model " in refused(Record(path, {**IDENTITY, "model": "b"}, "", model_only))


@pytest.mark.parametrize("content", ["", "years of work", "[1]", '{"format": "another"}'])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    message = refused(Record(path, IDENTITY, "Give another --output"))
    assert f"`{path}` holds something else" in message
    assert message.endswith("Give another --output.")
    assert path.read_text() == content
