"""The page of ``varm-merge inspect``, in a real browser: it tells what ``inspect`` has found, to everybody."""

import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from browser import PHONE, Visit, contrasts
from click.testing import CliRunner
from inspected import Found, large, renamed
from mergekit.options import MergeOptions
from playwright.sync_api import Browser, Page
from tiny_models import Family

from varm_common.errors import UserError
from varm_common.tables import short_names
from varm_merge.cli import main
from varm_merge.inspection import html as inspection_page
from varm_merge.inspection.measure import inspect
from varm_merge.inspection.page import render
from varm_merge.merging.weight_log import natural_order

pytest_plugins = ["browser"]

QUIET = MergeOptions(quiet=True)
HOSTILE = [
    "</script ><script>alert(1)</script>",
    "\"><img src=x onerror=alert(2)> \\u2028 \u2028 ' & {{ 7 * 7 }}",
    "модель-名前-😀" + "long" * 60,
]


@pytest.fixture(scope="module")
def members(family: Callable[..., Family]) -> Family:
    return family("llama", targets=3)


@pytest.fixture(scope="module")
def found(members: Family, tmp_path_factory: pytest.TempPathFactory) -> Found:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(runs.recipe(members))
    return inspect(recipe, QUIET)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Found], Path]:
    def write(found: Found) -> Path:
        inspection_page.draw(found, tmp_path / "page.html")
        return tmp_path / "page.html"

    return write


def text_of(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def column_of(page: Page, table: str, column: int) -> list[str]:
    return text_of(page, f"#{table} tbody tr > :nth-child({column})")


def maps_of(page: Page) -> dict[str, dict[tuple[str, str], str]]:
    """For each target's map, the texts of its cells by the headers of their row and column."""
    read: dict[str, dict[tuple[str, str], str]] = page.evaluate("""() => Object.fromEntries(
      [...document.querySelectorAll("#maps figure")].map((map) => {
        const heads = [...(map.querySelector("thead tr:last-child")?.cells ?? [])].map((head) => head.textContent);
        const block = (cell) => (cell.colSpan > 1 || !heads.length ? "" : heads[cell.cellIndex - 1]);
        const cells = [...map.querySelectorAll("tbody tr")].flatMap(
          ({ cells: [part, ...others] }) => others.map((one) => [part.textContent, block(one), one.textContent]),
        );
        return [map.querySelector("figcaption").textContent, cells];
      }))""")
    return {name: {(row, column): text for row, column, text in cells} for name, cells in read.items()}


def expected_cells(units: Iterable[Found], target: str) -> dict[tuple[str, str], str]:
    cells = {}
    for unit in units:
        block = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", unit["unit"])
        row, column = (block[2] or "whole block", block[1]) if block else (unit["unit"], "")
        row = {"model": "whole model"}.get(row, row.removesuffix(".weight"))
        cells[row, column] = f"{unit['targets'][target]['weight']:.3f}"
    return cells


# What it tells


def test_each_target_and_granularity_shows_the_weights_that_inspect_found(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    page = visit(written(found))
    names = [Path(target).name for target in found["targets"]]
    assert text_of(page, "#granularity option")[0] == "the recipe's own (matrix)"
    for granularity, units in found["units"].items():
        page.select_option("#granularity", granularity)
        page.select_option("#target", "-1")
        cells = {name: expected_cells(units, target) for name, target in zip(names, found["targets"], strict=True)}
        assert maps_of(page) == cells
        for index, name in enumerate(names):
            page.select_option("#target", str(index))
            assert maps_of(page) == {name: cells[name]}


def test_the_table_of_units_follows_the_granularity(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    page = visit(written(found))
    page.click("#units-details summary")
    for granularity in ("recipe", "layer", "module"):
        page.select_option("#granularity", granularity)
        units = found["units"][granularity]
        assert f"{len(units)} unit" in text_of(page, "#units-details summary")[0]
        assert column_of(page, "units", 1) == [unit["unit"] for unit in units]
        for column, target in enumerate(found["targets"], start=3):
            assert column_of(page, "units", column) == [f"{u['targets'][target]['weight']:.3f}" for u in units]


def test_blocks_moved_as_far_as_their_elements_on_average(
    found: Found, members: Family, written: Callable[[Found], Path], visit: Visit
) -> None:
    pivot = runs.checkpoint(members.pivot)
    page = visit(written(found))
    for block, key in enumerate(["Home", "End"]):
        page.press("#block", key)
        told = page.inner_text("#depth-readout")
        assert told.startswith(f"model.layers.{block} · ")
        for target in members.targets:
            tensors = runs.checkpoint(target)
            deltas = [tensors[name] - pivot[name] for name in pivot if name.startswith(f"model.layers.{block}.")]
            mean = np.mean(np.square(np.concatenate([delta.ravel() for delta in deltas])))
            told_mean = re.search(rf"{target.name} (\S+)", told)
            assert told_mean is not None
            assert float(told_mean[1]) == pytest.approx(mean, rel=5e-3)
    assert page.get_attribute("#block", "aria-valuetext") == told
    lines = page.locator("#plot path:not(.mark)")
    dashes = [line.get_attribute("stroke-dasharray") for line in lines.all()]
    assert len({*dashes}) == 3  # not told apart by colour alone
    paths = [line.get_attribute("d") or "" for line in lines.all()]
    heights_KB = np.array([[float(y) for y in re.findall(r" ([\d.]+)", path)] for path in paths])
    means_BK = page.locator("#depth-table tbody tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.cells].slice(1).map((cell) => Number(cell.dataset.value)))"
    )
    assert list(np.argsort(np.ravel(means_BK))) == list(np.argsort(-heights_KB.T.ravel()))
    ticks = [float(tick) for tick in page.locator("#plot text[text-anchor=end]").all_text_contents()]
    assert ticks[0] <= np.min(means_BK) <= np.max(means_BK) <= ticks[-1]


def test_a_line_is_broken_where_its_target_did_not_move(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    found = large(found, 4)
    for tensor in found["tensors"]:
        if tensor["block"] == "model.layers.1":
            tensor["targets"][found["targets"][1]]["mean_squared_delta"] = 0.0
    lines = visit(written(found)).locator("#plot path:not(.mark)").all()
    assert [re.sub(r"[\d. ]", "", line.get_attribute("d") or "") for line in lines] == ["MLLL", "MML", "MLLL"]


def test_the_agreement_of_each_pair_is_shown(found: Found, written: Callable[[Found], Path], visit: Visit) -> None:
    page = visit(written(found))
    cosine, conflicts = page.locator("table.matrix").all()
    names = [Path(target).name for target in found["targets"]]
    for pair in found["agreement"]["pairs"]:
        one, other = (found["targets"].index(target) for target in pair["targets"])
        for row, column in ((one, other), (other, one)):
            for matrix, text in ((cosine, f"{pair['cosine']:.3f}"), (conflicts, f"{pair['sign_conflicts']:.1%}")):
                line = matrix.locator("tbody tr").nth(row)
                assert line.locator("th").inner_text() == names[row]
                assert line.locator("td").nth(column).inner_text() == text
    most = max(found["agreement"]["pairs"], key=lambda pair: pair["cosine"])
    first, second = (Path(target).name for target in most["targets"])
    assert f"{first} and {second} ({most['cosine']:.2f}) moved most alike" in page.inner_text("main")


def test_what_each_granularity_would_do_is_counted(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    page = visit(written(found))
    rows = [[cell.strip() for cell in line.split("\t")] for line in text_of(page, "#effects tbody tr")]
    for row, units in zip(rows, found["units"].values(), strict=True):
        assert row[1] == str(len(units))
        weights_UK = np.array([[of["weight"] for of in unit["targets"].values()] for unit in units])
        for cell, weights_U in zip(row[2:5], weights_UK.T, strict=True):
            told = [float(number) for number in cell.split(" · ")]
            spread = [weights_U.min(), np.median(weights_U), weights_U.max()]
            assert told == pytest.approx(spread if len(told) > 1 else spread[:1], abs=6e-4)
        sizes_U = np.array([unit["elements"] for unit in units])
        apart = np.average(np.abs(weights_UK - 1 / 3).sum(1) / 2, weights=sizes_U)
        assert float(row[5].rstrip("%")) / 100 == pytest.approx(apart, abs=6e-4)
        leads = dict(part.rsplit(None, 1) for part in row[6].split(", "))
        won = np.bincount(weights_UK.argmax(1), minlength=3)
        assert leads == {f"target_{i + 1}": str(won[i]) for i in range(3) if won[i]}


def test_a_finished_merge_tells_what_it_has_and_where_the_rest_is(
    members: Family, tmp_path: Path, visit: Visit
) -> None:
    merged = runs.merge(runs.recipe(members, granularity="layer"), tmp_path / "out")
    html = tmp_path / "finished.html"
    done = CliRunner().invoke(main, ["inspect", str(merged.folder), "--html", str(html)])
    assert done.exit_code == 0, done.output
    page = visit(html)
    assert "varm-merge inspect recipe.yaml --html page.html" in page.inner_text("#finished")
    assert page.title() == "Weights of out · varm-merge"
    assert text_of(page, "h2") == ["The merge", "Weights", "The weights in numbers"]
    assert text_of(page, "#granularity option") == ["the recipe's own (layer)"]
    assert maps_of(page)["target_2"] == expected_cells(merged.log["units"], str(members.targets[1]))
    page.click("text=The recipe itself")
    assert "granularity: layer" in page.inner_text("pre")


def test_units_without_weights_are_shown_as_such(
    members: Family, tmp_path: Path, written: Callable[[Found], Path], visit: Visit
) -> None:
    recipe = tmp_path / "recipe.yaml"
    temperatures = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    recipe.write_text(runs.recipe(members, normalization="softmax", temperature=temperatures))
    found = inspect(recipe, QUIET)
    still, fewer = found["units"]["recipe"][:2]
    still["moved"] = False
    for of in still["targets"].values():
        of.update(statistic=0.0, weight=1 / 3)
    del fewer["targets"][found["targets"][0]]
    page = visit(written(found))
    told = " ".join(text_of(page, ".warning"))
    assert f"No target moved 1 unit ({still['unit']})" in told
    assert f"Not every target has 1 unit ({fewer['unit']})" in told
    assert "Granularity layer: 2 units cannot be merged. unit `model.layers.0`" in told
    page.locator("#maps .still").first.hover()
    assert "no target moved: the pivot is kept" in page.inner_text("#readout")
    page.locator("#maps .absent").hover()
    assert "not in this target" in page.inner_text("#readout")
    assert {"not in this target", "no target moved: the pivot is kept"} <= {
        text.partition(" ")[2] for text in text_of(page, "#legend .mark")
    }
    page.select_option("#granularity", "layer")
    assert page.locator("#maps .wrong").count() == 2 * 3
    page.locator("#maps .wrong").first.focus()
    assert "cannot be merged" in page.inner_text("#readout")
    assert contrasts(page)[0][0] >= 4.5


# How it is used


def test_tables_sort_by_mouse_and_keyboard(found: Found, written: Callable[[Found], Path], visit: Visit) -> None:
    found = large(found, 12)
    for number, tensor in enumerate(found["tensors"]):  # no two moved as far
        for of in tensor["targets"].values():
            of["mean_squared_delta"] *= 1 + number * 1e-6
    page = visit(written(found))
    moves = {t["tensor"]: max(of["mean_squared_delta"] for of in t["targets"].values()) for t in found["tensors"]}
    by_move = sorted(moves, key=moves.__getitem__)
    page.select_option("#shown", index=1)
    assert column_of(page, "tensors", 1) == by_move[::-1]
    page.click("#tensors th:has-text('greatest') button")
    assert column_of(page, "tensors", 1) == by_move
    assert page.get_attribute("#tensors th:has-text('greatest')", "aria-sort") == "ascending"
    page.focus("#tensors th:has-text('tensor') button")
    page.keyboard.press("Enter")
    assert column_of(page, "tensors", 1) == sorted(moves, key=natural_order)
    assert page.locator("#tensors th[aria-sort]").count() == 1
    page.keyboard.press("Space")
    assert column_of(page, "tensors", 1) == sorted(moves, key=natural_order, reverse=True)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sizes = [int(size.replace(",", "")) for size in column_of(page, "tensors", 2)]
    assert sizes == sorted(sizes, reverse=True)
    page.select_option("#shown", "10")
    assert page.locator("#tensors tbody tr:visible").count() == min(20, len(moves))


def test_each_matrix_of_each_expert_has_a_row(
    family: Callable[..., Family], written: Callable[[Found], Path], visit: Visit, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(family("mixtral")))
    page = visit(written(inspect(recipe, QUIET)))
    heads = page.locator("#maps figure").first.locator("tbody th")
    assert [row for row in heads.all_inner_texts() if "experts" in row] == [
        f"mlp.experts.{expert}.{matrix}_proj" for expert in range(3) for matrix in ("down", "gate", "up")
    ]
    page.select_option("#granularity", "parameter")
    packed = [row for row in heads.all_inner_texts() if "experts" in row]
    assert packed == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_arrow_keys_walk_through_a_map_and_tab_leaves_it(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    page = visit(written(found))
    page.select_option("#target", "1")
    page.focus("#granularity")
    page.keyboard.press("Tab")
    cells = expected_cells(found["units"]["recipe"], found["targets"][1])

    def read_out() -> tuple[str, str]:
        told = re.match(r"(\S+) · target_2: weight ([\d.]+) · even share 0.333", page.inner_text("#readout"))
        assert told is not None, page.inner_text("#readout")
        return told[1], told[2]

    visited = []
    for key in ("", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End", "Home"):
        if key:
            page.keyboard.press(key)
        visited.append(read_out()[0])
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    below = "model.layers.1.mlp.down_proj.weight"
    expected = [first, second, second, below, below.replace("1", "0"), first, second, first]
    assert visited == expected
    page.keyboard.press("Control+End")
    assert read_out()[0] == "model.norm.weight"
    assert f"{float(read_out()[1]):.3f}" == cells["model.norm", ""]
    page.keyboard.press("ArrowUp")
    assert read_out()[0] == "model.embed_tokens.weight"
    assert page.locator("#maps td[tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_a_finger_reads_what_a_pointer_reads(found: Found, written: Callable[[Found], Path], visit: Visit) -> None:
    page = visit(written(found), **PHONE)
    cell = page.locator("#maps figure").nth(2).locator("td[tabindex]").nth(3)
    cell.tap()
    assert "target_3: weight" in page.inner_text("#readout")
    page.keyboard.press("ArrowDown")  # goes on in the column that was tapped
    assert page.inner_text("#readout").startswith("model.layers.1.mlp.gate_proj")
    box = page.locator("#readout").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 740  # in view, wherever the finger is
    page.tap("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_both_themes(
    scheme: Any, found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    page = visit(written(found), color_scheme=scheme)
    for details in page.locator("summary").all():
        details.click()
    page.locator("#maps td[tabindex]").first.focus()

    def shown(theme: str) -> None:
        grounds = (page.evaluate("getComputedStyle(document.body).backgroundColor") for _ in range(200))
        assert any((sum(map(int, re.findall(r"\d+", ground))) < 200) == (theme == "dark") for ground in grounds)
        assert contrasts(page)[0][0] >= 4.5, contrasts(page)[:3]

    shown(scheme)
    other = "light" if scheme == "dark" else "dark"
    page.click(f"text={other.capitalize()} theme")
    shown(other)
    page.reload()
    shown(other)
    page.emulate_media(media="print")  # on white paper, whatever the screen has
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert contrasts(page)[0][0] >= 4.5, contrasts(page)[:3]


def test_a_phone_scrolls_one_way_only(
    found: Found, members: Family, tmp_path: Path, written: Callable[[Found], Path], visit: Visit
) -> None:
    for one in (found, large(found, 40), renamed(found, HOSTILE)):
        page = visit(written(one), **PHONE)
        for details in page.locator("summary").all():
            details.click()
        for granularity in ("recipe", "model", "layer"):
            page.select_option("#granularity", granularity)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_names_are_shown_and_never_run(found: Found, written: Callable[[Found], Path], visit: Visit) -> None:
    hostile = renamed(found, HOSTILE)
    hostile["recipe"]["content"]["models"] = HOSTILE
    for units in hostile["units"].values():
        units[0]["unit"], units[-1]["unit"] = HOSTILE[:2]
    hostile["tensors"][0]["tensor"] = HOSTILE[0]
    page = visit(written(hostile))
    names = page.locator("#target option").evaluate_all("(all) => all.slice(1).map((one) => one.textContent)")
    assert names == short_names(HOSTILE)
    page.click("#units-details summary")
    page.click("text=The recipe itself")
    assert page.locator("img, #maps script").count() == 0
    assert page.locator("script").count() == 3
    assert HOSTILE[0] in page.inner_text("#tensors")
    assert "alert(2)" in page.inner_text("#units")
    page.select_option("#granularity", "layer")
    assert HOSTILE[0] in page.inner_text("#maps")
    page.locator("#maps tr", has_text="onerror").locator("td").last.focus()
    assert page.inner_text("#readout").count("onerror") == 1


def test_a_page_runs_and_loads_nothing_that_came_later(
    found: Found, written: Callable[[Found], Path], browser: Browser
) -> None:
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(written(found).as_uri())
    with socket.create_server(("127.0.0.1", 0)) as server:
        page.evaluate(
            """async (url) => {
              const script = document.createElement("script");
              script.textContent = "window.intruder = 1";
              document.body.append(script);
              document.body.insertAdjacentHTML("beforeend", `<img src="${url}" onerror="window.intruder = 2">`);
              await fetch(url, { signal: AbortSignal.timeout(1000) }).catch(() => {});
            }""",
            f"http://127.0.0.1:{server.getsockname()[1]}/",
        )
        page.wait_for_timeout(200)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has called
    assert page.evaluate("window.intruder") is None
    assert sum("Content Security Policy" in text for text in said) >= 3
    page.close()


def test_without_scripts_the_tables_stay(
    found: Found, written: Callable[[Found], Path], visit: Visit, browser: Browser
) -> None:
    html = written(found)
    pages = [visit(html, java_script_enabled=False), browser.new_page()]
    # a script that somebody has changed on the way is none that the page lets run
    html.write_text(html.read_text().replace("function heatMap", "function  heatMap"))
    pages[1].goto(html.as_uri())
    for page in pages:
        assert "scripts do not run here" in page.inner_text(".without-script")
        assert not page.locator("#target").is_visible()
        assert page.locator("#effects tbody tr").count() == 6
        assert page.locator("#tensors tbody tr:visible").count() == len(found["tensors"])
        page.click("#units-details summary")
        assert column_of(page, "units", 1) == [unit["unit"] for unit in found["units"]["recipe"]]
    pages[1].close()


def test_a_large_model_is_a_small_file_that_answers_at_once(
    found: Found, written: Callable[[Found], Path], visit: Visit
) -> None:
    html = written(large(found, 80))
    assert html.stat().st_size < 2e6
    page = visit(html)
    assert page.locator("#maps td[tabindex]").count() == 3 * (80 * 9 + 3)
    milliseconds = page.evaluate("""() => {
      const granularity = document.getElementById("granularity");
      return ["module", "matrix", "parameter", "matrix", "layer", "matrix"].map((value) => {
        const start = performance.now();
        granularity.value = value;
        granularity.dispatchEvent(new Event("change"));
        document.body.getBoundingClientRect();
        return performance.now() - start;
      });
    }""")
    assert sorted(milliseconds)[3] < 300, milliseconds  # under 100 on an idle machine; tests share it


# The command and its file


def test_the_command_writes_the_page(found: Found, members: Family, tmp_path: Path, visit: Visit) -> None:
    recipe, html = tmp_path / "my recipe.yaml", tmp_path / "my page.html"
    recipe.write_text(runs.recipe(members))
    done = CliRunner().invoke(main, ["inspect", str(recipe), "--quiet", "--html", str(html)])
    assert done.exit_code == 0, done.output
    page = visit(html)
    assert page.title() == "Weights of my recipe.yaml · varm-merge"
    assert maps_of(page)["target_1"] == expected_cells(found["units"]["recipe"], found["targets"][0])
    first = html.read_bytes()
    CliRunner().invoke(main, ["inspect", str(recipe), "--quiet", "--html", str(html)])
    assert html.read_bytes() == first


def test_a_page_that_cannot_be_written_is_a_sentence(members: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(members).replace(str(members.targets[0]), "/no/such/model"))
    done = CliRunner().invoke(main, ["inspect", str(recipe), "--html", str(tmp_path / "nowhere" / "page.html")])
    assert done.exit_code == 1
    assert "page.html` cannot be written: there is no folder" in done.output  # before the recipe is looked at


def test_who_reads_a_page_while_it_is_written_again_reads_the_old_one(
    found: Found, written: Callable[[Found], Path]
) -> None:
    path = written(found)
    before = path.read_bytes()
    with path.open("rb") as reader:
        written(large(found, 3))
        assert reader.read() == before
    assert path.read_bytes() != before


def test_on_a_full_disk_the_old_page_stays(small_disk: Callable[[int], Path], found: Found) -> None:
    folder = small_disk(1 << 18)
    path = folder / "page.html"
    inspection_page.draw(found, path)
    before = path.read_bytes()
    (folder / "other").write_bytes(bytes((1 << 18) - len(before) - 8192))
    with pytest.raises(UserError, match=r"page.html` cannot be written: No space left on device"):
        inspection_page.draw(large(found, 80), path)
    assert path.read_bytes() == before
    assert sorted(one.name for one in folder.iterdir()) == ["other", "page.html"]


def test_the_page_holds_no_number_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        render("base.html", data={"weight": float("nan")})
