"""What the programs write is whole or not there, and they say so when they cannot write."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from click.testing import CliRunner
from programs import BIN
from tiny_models import Family

from varm_common import files, tables
from varm_common.errors import UserError, did_you_mean
from varm_common.files import HashCache, demand_place, locked, write_file
from varm_merge.cli import main


def recipe_of(family: Family, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(runs.recipe(family))
    return path


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "größe.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["größe.txt"]


def test_a_full_disk_leaves_what_was_there(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(1 << 16)
    write_file(folder / "page.html", "old")
    with pytest.raises(UserError, match=r"page.html` cannot be written: No space left on device"):
        write_file(folder / "page.html", b"x" * (1 << 17))
    assert [(one.name, one.read_text()) for one in folder.iterdir()] == [("page.html", "old")]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_file(tmp_path / "pipe", "through")
    assert reader.communicate()[0] == "through"
    assert (tmp_path / "pipe").is_fifo()


HOLDING = """
import sys, time
from pathlib import Path
from varm_common.files import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_lock_keeps_other_processes_out_until_its_holder_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is at work"), locked(lock, "another run is at work"):
        pytest.fail("locked twice")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(lock, "another run is at work", patience_s=5):
        pass


def test_a_locked_file_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("finished\n")
    with locked(path, "busy") as descriptor:
        assert descriptor is not None
        with pytest.raises(UserError, match="busy"), locked(path, "busy"):
            pytest.fail("locked twice")
    assert path.read_text() == "finished\n"


def test_a_folder_that_takes_no_lock_does_not_stop_the_work(tmp_path: Path) -> None:
    with locked(tmp_path / "nowhere" / "lock", "busy"):
        pass


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_text("one")
    cache = HashCache(tmp_path / "sums.json")
    first = cache.sha256(path)
    assert first == files.sha256_of(path)
    cache.save()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_of", lambda _: pytest.fail("read again"))
        again = HashCache(tmp_path / "sums.json")
        assert again.sha256(path) == first
    path.write_text("other")
    assert cache.sha256(path) == files.sha256_of(path) != first
    for damaged in ("", "[]", '{"x": 1}'):
        (tmp_path / "sums.json").write_text(damaged)
        assert HashCache(tmp_path / "sums.json").sha256(path) == files.sha256_of(path)


def test_a_misspelt_word_is_recognised() -> None:
    assert did_you_mean("matrx", ["layer", "matrix"]) == "; did you mean `matrix`?"
    assert did_you_mean("colour", ["layer", "matrix"]) == ""
    assert did_you_mean("colour", ["layer", "matrix"], list_known=True) == "; known are layer, matrix"
    assert did_you_mean("vram", ["sram", "varm"]) == "; did you mean `varm`?"  # the same letters


def test_a_place_that_takes_no_file_is_known_beforehand(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(1 << 16)
    demand_place(folder / "page.html")
    assert list(folder.iterdir()) == []
    with pytest.raises(UserError, match="it is a folder"):
        demand_place(folder)
    with pytest.raises(UserError, match="there is no folder"):
        demand_place(folder / "nowhere" / "page.html")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for attempt in (demand_place, lambda path: write_file(path, "x")):
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            attempt(folder / "page.html")


def test_an_output_that_cannot_be_written_is_reported_before_anything_is_measured(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varm_merge.merging.planning.planned_tensors", lambda *_: pytest.fail("measured"))
    for flag in ("--html", "--png"):
        place = tmp_path / "nowhere" / "file"
        done = CliRunner().invoke(main, ["inspect", str(recipe_of(mistral, tmp_path)), flag, str(place)])
        assert (done.exit_code, "there is no folder" in done.stderr) == (1, True)


def test_a_full_standard_output_is_reported() -> None:
    with Path("/dev/full").open("w") as full:
        command = [BIN / "varm-merge", "completion", "bash"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output cannot be written: No space left on device\n"


def test_a_closed_standard_output_does_not_fail_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    tables.show("title", ["", "model"], [["a", "1"]])


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
