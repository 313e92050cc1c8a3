"""One style of command line for both programs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tiny_fusion import World

import fusion_trainer.cli
import varm_merge.cli
from varm_merge.version import __version__

PROGRAMS = {"varm-merge": varm_merge.cli.main, "fusion-trainer": fusion_trainer.cli.main}
BIN = Path(sys.executable).parent


def commands(program: str) -> Iterator[tuple[list[str], click.Command]]:
    """Every command with its words."""
    waiting: list[tuple[list[str], click.Command]] = [([], PROGRAMS[program])]
    while waiting:
        words, command = waiting.pop()
        if isinstance(command, click.Group):
            waiting += [([*words, name], one) for name, one in command.commands.items()]
        else:
            yield words, command


EVERY = [pytest.param(program, *one, id=" ".join(one[0])) for program in PROGRAMS for one in commands(program)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_print_their_version_and_exit_codes(program: str) -> None:
    result = CliRunner().invoke(PROGRAMS[program], ["--version"], prog_name=program)
    assert result.output.split() == [f"{program},", "version", __version__]
    assert "Exit codes: 0" in CliRunner().invoke(PROGRAMS[program], ["-h"]).output
    assert CliRunner().invoke(PROGRAMS[program], ["no-such-command"]).exit_code == 2


@pytest.mark.parametrize(("program", "words", "command"), EVERY)
def test_every_command_helps_with_an_example(program: str, words: list[str], command: click.Command) -> None:
    result = CliRunner().invoke(PROGRAMS[program], [*words, "--help"], prog_name=program)
    assert result.exit_code == 0
    _, _, examples = result.output.partition("Example")
    assert " ".join([program, *words]) in examples
    assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("arguments", ["varm-merge compare --help", "fusion-trainer extract --help"])
def test_output_in_another_encoding_has_question_marks(arguments: str) -> None:
    program, *words = arguments.split()
    done = subprocess.run([BIN / program, *words], env={"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "…" in CliRunner().invoke(PROGRAMS[program], words).output
    assert b"?" in done.stdout


@pytest.mark.parametrize(("program", "words", "command"), EVERY)
def test_what_takes_long_can_be_quiet_or_verbose(program: str, words: list[str], command: click.Command) -> None:
    short = {"check", "doctor", "yaml", "completion", "recipe", "show", "verify", "results"}
    flags = {flag for option in command.params for flag in option.opts}
    assert words[-1] in short or {"-q", "--quiet", "-v", "--verbose"} <= flags


@pytest.mark.slow
def test_quiet_shows_no_progress(fusion: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")  # the command's own settings end with the test
    asked = [
        "prepare",
        "--data",
        str(fusion.folder / "chats.jsonl"),
        "--pivot",
        str(fusion.folder / "pivot"),
        "--template",
        "openchat",
        "--dialogues",
    ]
    loud = CliRunner().invoke(fusion_trainer.cli.main, [*asked, str(tmp_path / "loud")])
    quiet = CliRunner().invoke(fusion_trainer.cli.main, [*asked, str(tmp_path / "quiet"), "--quiet"])
    assert (loud.exit_code, quiet.exit_code) == (0, 0), loud.stderr
    assert "conversations/s" in loud.stderr
    assert quiet.stderr == ""
    both = CliRunner().invoke(fusion_trainer.cli.main, [*asked, str(tmp_path / "both"), "-q", "-v"])
    assert (both.exit_code, "--quiet or --verbose, not both" in both.stderr) == (2, True)


COMPLETE = """
eval "$({program} completion bash)"
COMP_WORDS=({program} {typed}) COMP_CWORD=1
_{function}_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "typed", "completed"), [("varm-merge", "ins", "inspect"), ("fusion-trainer", "ext", "extract")]
)
def test_bash_completes_commands(program: str, typed: str, completed: str) -> None:
    script = COMPLETE.format(program=program, typed=typed, function=program.replace("-", "_"))
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{BIN}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [completed], done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_other_shells_get_a_script_of_their_own(program: str, shell: str) -> None:
    result = CliRunner().invoke(PROGRAMS[program], ["completion", shell], prog_name=program)
    assert result.exit_code == 0
    assert f"{shell}_complete" in result.output
    assert program in result.output
