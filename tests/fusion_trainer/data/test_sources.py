"""JSON arrays are read item by item: the same rows as from the whole file, in bounded memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_trainer.data import sources
from fusion_trainer.data.sources import open_source
from varm_common.errors import UserError

property_test = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text('aé"\\,]}[{ 🙂\n', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab]", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def rows(path: Path) -> list[Any]:
    return [row for _, row in open_source(str(path)).rows()]


@property_test
@given(items=st.lists(VALUES, max_size=6), at_once=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_an_array_has_the_items_that_json_finds(
    items: list[Any], at_once: int, indent: int | None, tmp_path: Path
) -> None:
    path, before = tmp_path / "chats.json", sources.READ_AT_ONCE
    path.write_text(" \n" + json.dumps(items, indent=indent, ensure_ascii=at_once % 2 == 0) + "\n", "utf-8")
    sources.READ_AT_ONCE = at_once
    try:
        assert rows(path) == items
    finally:
        sources.READ_AT_ONCE = before


@property_test
@given(items=st.lists(VALUES, min_size=1, max_size=4), at_once=st.integers(1, 40), data=st.data())
def test_what_json_refuses_is_refused(items: list[Any], at_once: int, data: st.DataObject, tmp_path: Path) -> None:
    text = json.dumps(items)
    place = data.draw(st.integers(1, len(text) - 1))
    broken = data.draw(st.sampled_from([text[:place], text[:place] + "]" + text[place:], text + ",", text + "[]"]))
    try:
        json.loads(broken)
    except ValueError:
        path, before = tmp_path / "chats.json", sources.READ_AT_ONCE
        path.write_text(broken, "utf-8")
        sources.READ_AT_ONCE = at_once
        try:
            with pytest.raises(UserError, match=r"chats\.json is not JSON"):
                rows(path)
        finally:
            sources.READ_AT_ONCE = before


def test_a_broken_item_is_named_and_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text('[{"text": "One."},\n {"text": oops},\n' + ",\n".join(['{"text": "More."}'] * 10**5) + "]")
    source = open_source(str(path)).rows()
    assert next(source) == ("chats.json, row 1", {"text": "One."})
    with pytest.raises(UserError, match=r"row 2: line 2: Expecting value: 'oops"):
        next(source)


def test_the_memory_for_an_array_does_not_grow_with_it(tmp_path: Path) -> None:
    peaks = []
    for items in (8_000, 24_000):
        path = tmp_path / f"{items}.json"
        path.write_text(json.dumps([{"text": "many words " * 60, "number": n} for n in range(items)]))
        source = open_source(str(path))
        tracemalloc.start()
        assert sum(row["number"] for _, row in source.rows()) == items * (items - 1) // 2
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 24_000 * 660  # bytes of the larger file
