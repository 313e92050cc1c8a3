"""What the programs write is whole or not there, and they say so when they cannot write."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from click.testing import CliRunner
from programs import BIN
from tiny_models import Family

from varm_common import tables
from varm_common.errors import UserError
from varm_common.files import demand_place, write_whole
from varm_merge.cli import main


def recipe_of(family: Family, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(runs.recipe(family))
    return path


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "größe.txt"
    write_whole(path, "one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["größe.txt"]


def test_a_full_disk_leaves_what_was_there(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(1 << 16)
    write_whole(folder / "page.html", "old")
    with pytest.raises(UserError, match=r"page.html` cannot be written: No space left on device"):
        write_whole(folder / "page.html", b"x" * (1 << 17))
    assert [(one.name, one.read_text()) for one in folder.iterdir()] == [("page.html", "old")]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_whole(tmp_path / "pipe", "through")
    assert reader.communicate()[0] == "through"
    assert (tmp_path / "pipe").is_fifo()


def test_a_place_that_takes_no_file_is_known_beforehand(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(1 << 16)
    demand_place(folder / "page.html")
    assert list(folder.iterdir()) == []
    with pytest.raises(UserError, match="it is a folder"):
        demand_place(folder)
    with pytest.raises(UserError, match="there is no folder"):
        demand_place(folder / "nowhere" / "page.html")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for attempt in (demand_place, lambda path: write_whole(path, "x")):
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            attempt(folder / "page.html")


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varm_merge.merging.planning.planned_tensors", lambda *_: pytest.fail("measured"))
    for flag in ("--html", "--png"):
        place = tmp_path / "nowhere" / "file"
        done = CliRunner().invoke(main, ["inspect", str(recipe_of(mistral, tmp_path)), flag, str(place)])
        assert (done.exit_code, "there is no folder" in done.stderr) == (1, True)


def test_a_full_standard_output_is_told(mistral: Family, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [BIN / "varm-merge", "check", recipe_of(mistral, tmp_path), "--offline"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "Error: standard output cannot be written: No space left on device\n"


def test_no_color_is_obeyed(mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["check", str(recipe_of(mistral, tmp_path)), "--offline"]
    assert "\x1b[32m" in CliRunner().invoke(main, arguments, color=True).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(main, arguments, color=True).output


def test_brackets_in_a_name_are_no_markup_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tables.show("runs[/tmp]", ["", "model[v2]"], [["a[/b]", "1[red]"]])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("runs[/tmp]", "model[v2]", "a[/b]", "1[red]"))
