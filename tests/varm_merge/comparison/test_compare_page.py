"""The page of ``varm-merge compare``, in a real browser: what it shows, sorted, in both themes, on a phone."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, Visit, contrasts

from varm_merge.comparison.report import markdown, tables, write_page

pytest_plugins = ["browser"]

HOSTILE = "<script>alert(1)</script>|`x`"
GROUPS = {"all": 0.2, "sums & dates": 0.3}
MERGES = {f"merge-{number}": number / 40 for number in (10, 9, 3, 8)}
NUMBERS = {"pivot": 0.0, "one": 0.21, "two": 0.2, **MERGES, "stacked": 0.15}
"""Of each model with results."""


def found(name: str, role: str, number: float, **changed: Any) -> dict[str, Any]:
    """A row as ``report.json`` has it."""
    to = {"distance": number / 2, "cosine": 1 - number, "sign_agreement": 1 - number / 2}
    groups = {
        group: {
            "nats_per_byte": loss + number,
            "exact_match": 0.5 - number,
            "cut_tokens": 0,
            "against": {
                other: {"nats_per_byte": [number - theirs, 0.001], "exact_match": [theirs - number, 0.001]}
                for other, theirs in NUMBERS.items()
                if other != name
            },
        }
        for group, loss in GROUPS.items()
    }
    score = {"value": number, "standard_error": 0.05, "higher_is_better": True, "samples": 9, "group": False}
    row = {
        "name": name,
        "role": role,
        "model": f"/models/{name}",
        "problems": [],
        "runs": [],
        "bytes": None,
        "distances": {
            "pivot": number,
            "targets": {"one": to, "two": to},
            "tensors": 3,
            "elements": 9,
            "not_compared": {"tensors": 0, "some": []},
        },
        "held_out": groups,
        "tasks": {"jumps": [{"task": "jumps", "metric": "acc", **score}]},
    }
    if role == "merge":
        recipe = {"path": f"{name}.yaml", "text": f"merge_method: varm # {name}\n"}
        row |= {"method": "varm", "settings": "", "recipe": recipe}
        row["runs"] = [{"wall_s": 100 * number, "cpu_s": 1.0, "anonymous_mib": 900.0 + run} for run in range(3)]
    return {**row, **changed}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    nothing = {"runs": [], "distances": None, "held_out": None, "tasks": {}}
    problem = f"line 3: {HOSTILE} cannot be merged"
    moved = {"not_comparable": "it has 3 layers, the pivot 2"}
    merges = [found(name, "merge", number) for name, number in MERGES.items()]
    rows = [
        found("pivot", "pivot", 0.0),
        found("one", "target", 0.21),
        found("two", "target", 0.2),
        *merges,
        found(HOSTILE, "merge", 0.1, problems=[problem], **nothing),
        found("stacked", "merge", 0.15, distances=moved),
    ]
    return {
        "command": "varm-merge compare x.yaml",
        "machine": "a machine",
        "memory": "RssAnon",
        "repeat": 3,
        "mergekit_options": ["--quiet"],
        "input_bytes": 2,
        "memory_bytes": 1,
        "rows": rows,
    }


@pytest.fixture(scope="module")
def path(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("a page") / "report.html"
    write_page(report, file)
    return file


def test_every_number_of_the_tables_is_on_the_page_and_the_best_is_marked(
    report: dict[str, Any], path: Path, visit: Visit
) -> None:
    page = visit(path)
    for one in tables(report):
        table = page.locator(f"section:has(h2#{one.name}) table")
        assert table.locator("thead th").all_inner_texts() == [f"{name}" for name in one.header]
        lines = table.locator("tbody tr").all()
        assert len(lines) == len(one.rows)
        for line, (name, role, cells) in zip(lines, one.rows, strict=True):
            shown = name if role in ("merge", name) else f"{name} ({role})"
            assert line.locator("th").inner_text() == shown
            assert line.locator("td").all_inner_texts() == [cell.text for cell in cells]
            best = line.locator("td.best").all_inner_texts()
            assert best == [cell.text for cell in cells if cell.best]
    rows = page.locator("section:has(h2#side-by-side) tbody tr")
    fastest = rows.filter(has=page.locator("td.best", has_text="7.5"))
    assert fastest.locator("th").inner_text() == "merge-3"
    assert rows.filter(has_text="pivot").locator("td.best").all_inner_texts() == ["0.2000", "50.0%"]
    body = page.locator("body").inner_text()
    for told in (f"line 3: {HOSTILE} cannot", "stacked is not compared", "larger than the memory", "a machine"):
        assert told in body


@pytest.mark.parametrize(("error", "marked"), [(0.01, True), (0.04, False), (None, False)])
def test_a_score_is_marked_only_where_it_differs_from_every_other_by_more_than_noise(
    error: float | None, marked: bool, report: dict[str, Any]
) -> None:
    """The runner-up of the pivot is 0.075 away: more than two standard errors of 0.01, not of 0.04."""
    changed = copy.deepcopy(report)
    for row in changed["rows"]:
        for of in (row["held_out"] or {}).values():
            for other in of["against"].values():
                other["nats_per_byte"][1] = error
        for measures in row["tasks"].values():
            measures[0]["standard_error"] = error and error / 2**0.5  # of the difference of two: ``error``
    (side, *_), losses = tables(changed), [one for one in tables(changed) if one.name == "held-out"]
    for table, title in ((side, "loss, nats/byte"), (losses[0], "sums & dates")):
        column = table.header.index(title) - 1
        assert [name for name, _, cells in table.rows if cells[column].best] == (["pivot"] if marked else [])
    column = side.header.index("jumps, acc") - 1  # 0.25 and 0.225 lead: 0.025 apart
    best = [name for name, _, cells in side.rows if cells[column].best]
    assert best == (["merge-10"] if error == 0.01 else [])


def test_a_click_sorts_by_number_and_dashes_stay_last(path: Path, visit: Visit) -> None:
    page = visit(path)
    table = page.locator("section:has(h2#side-by-side) table")

    def names() -> list[str]:
        return [text.partition(" (")[0] for text in table.locator("tbody th").all_inner_texts()]

    unmeasured = ["pivot", "one", "two", HOSTILE]
    table.get_by_role("button", name="time, s").click()
    assert names() == ["merge-10", "merge-9", "merge-8", "stacked", "merge-3", *unmeasured]
    table.get_by_role("button", name="time, s").click()
    assert names() == ["merge-3", "stacked", "merge-8", "merge-9", "merge-10", *unmeasured]
    table.get_by_role("button", name="model").click()
    assert [name for name in names() if "merge" in name] == ["merge-3", "merge-8", "merge-9", "merge-10"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_both_themes_everything_can_be_read_plots_too(theme: Any, path: Path, visit: Visit) -> None:
    page = visit(path, color_scheme=theme)
    weakest, text = contrasts(page)[0]
    assert weakest >= 4.5, text
    card = page.locator("section").first.evaluate("one => getComputedStyle(one).backgroundColor")
    dots = (
        page.locator("figure")
        .first.locator(".merge use")
        .evaluate_all("all => all.map((mark) => getComputedStyle(mark).fill)")
    )
    assert len(dots) == 4
    assert card not in dots
    page.get_by_role("button", name=re.compile("theme")).click()
    assert page.locator("section").first.evaluate("one => getComputedStyle(one).backgroundColor") != card


def test_on_a_phone_nothing_scrolls_sideways_but_the_tables(path: Path, visit: Visit) -> None:
    page = visit(path, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    letters = page.locator("figure text").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().height)"
    )
    assert min(letters) > 9


def test_the_plots_have_a_mark_for_each_model_inside_them(path: Path, visit: Visit) -> None:
    page = visit(path)
    titles = page.locator("figcaption").all_inner_texts()
    scatter, *bars = page.locator("figure svg").all()
    assert titles[0] == "Held-out loss against distance to the pivot"
    assert titles[1:] == ["Time, s", "Peak anonymous memory, MiB", "jumps, acc"]
    assert scatter.locator(".mark").count() == scatter.locator(".name").count() == 7
    assert [plot.locator(".mark").count() for plot in bars] == [5, 5, 8]
    outside = """all => all.filter((one) => {
      const box = one.getBoundingClientRect(), frame = one.ownerSVGElement.getBoundingClientRect();
      return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
        || box.top < frame.top - 1;
    }).map((one) => one.textContent)"""
    assert page.locator("figure text").evaluate_all(outside) == []
    overlapping = """all => all.some((one, index) => all.slice(index + 1).some((other) => {
      const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
      return a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom;
    }))"""
    assert not scatter.locator(".name text").evaluate_all(overlapping)


def test_the_markdown_holds_the_same_and_no_name_breaks_a_table(report: dict[str, Any]) -> None:
    text = markdown(report)
    (line,) = [one for one in text.splitlines() if one.startswith("| <script>") and "(failed)" in one][:1]
    header = next(one for one in text.splitlines() if one.startswith("| model"))
    assert line.replace("\\|", "").count("|") == header.count("|")
    assert f"- {HOSTILE}: line 3: {HOSTILE} cannot be merged" in text
    for one in tables(report):
        for _, _, cells in one.rows:
            for cell in cells:
                assert (f"**{cell.text}**" if cell.best else f"| {cell.text}") in text
    assert "7.5 [7.5 – 7.5]" in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    mergekit-yaml ")]
    assert ["mergekit-yaml", f"{HOSTILE}.yaml", "OUT", "--quiet"] in commands


def test_a_comparison_without_a_single_result_is_a_page_too(
    report: dict[str, Any], tmp_path: Path, visit: Visit
) -> None:
    nothing = {"runs": [], "distances": None, "held_out": None, "tasks": {}}
    rows = [found("p", "pivot", 0, **nothing), found("m", "merge", 0, problems=["no disk"], **nothing)]
    write_page({**report, "rows": rows}, tmp_path / "empty.html")
    page = visit(tmp_path / "empty.html")
    assert "m: no disk" in page.locator("body").inner_text()
    assert page.locator("figure").count() == 0
