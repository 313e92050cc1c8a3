"""Commands of a run, as processes that do not outlive it.

Importing torch and transformers takes longer than many a small stage. The run imports once what all stages need,
and forks itself for each that is a command of this program, or mergekit's. It never touches the accelerator: a
fork of a process that has could not use it.
"""

import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from multiprocessing import get_context, parent_process
from pathlib import Path

import psutil

from varm_common.errors import UserError

__all__ = ["MERGEKIT", "OWN", "end_with_the_run", "output_of", "run_command"]

OWN = [sys.executable, "-m", "fusion_trainer"]
"""How a command of this program begins."""
MERGEKIT = ["mergekit-yaml"]
"""How a merge begins."""
NOT_INSTALLED = 127
"""Exit code of a program that is not there, as a shell gives it."""
ENDS_WITH = "FUSION_TRAINER_ENDS_WITH"
"""Names the machine and the process that a stage's command must not outlive."""


def run_command(command: Sequence[str], lock: int) -> int:
    """Run a command to its end.

    Args:
        command: The program and its arguments.
        lock: A descriptor that is to stay open as long as the command runs.

    Returns:
        The exit code; negative if a signal has ended it.

    Raises:
        UserError: There is no such program.
    """
    for name, known in (("fusion-trainer", OWN), ("mergekit-yaml", MERGEKIT)):
        if list(command[: len(known)]) == known:
            return _forked(name, command[len(known) :])
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": programs, ENDS_WITH: f"{platform.node()} {os.getpid()}"}
    try:
        return subprocess.run(command, env=environment, pass_fds=(lock,), check=False).returncode
    except OSError as error:
        raise UserError(f"`{command[0]}` cannot be started: {error.strerror}; see `launch`") from error


def end_with_the_run() -> None:
    """End this process as soon as the run it belongs to has ended, if it is a stage's and on the same machine."""
    machine, _, process = os.environ.get(ENDS_WITH, "").rpartition(" ")
    if machine == platform.node():
        threading.Thread(target=_outlive, args=(int(process),), daemon=True).start()


def output_of(program: str, arguments: Sequence[str]) -> str:
    """What an installed program prints, run in a fork of this process.

    Args:
        program: Its name on the command line.
        arguments: Of the command line.

    Raises:
        UserError: It printed nothing, or ended with another exit code than 0 or 1.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        process = get_context("fork").Process(target=_enter, args=(program, list(arguments), file.fileno()))
        process.start()
        process.join()
        file.seek(0)
        output = file.read()
    if process.exitcode not in (0, 1) or not output:
        how = f"ended with exit code {process.exitcode}; its message stands above"
        raise UserError(f"`{program} {arguments[0]}` {how}. `varm-merge doctor` checks the installation.")
    return output


def _forked(program: str, arguments: Sequence[str]) -> int:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for GPUs without touching them
    import fusion_trainer.pipeline.warm  # noqa: F401

    process = get_context("fork").Process(target=_enter, args=(program, list(arguments)))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode or 0


def _enter(program: str, arguments: list[str], output: int | None = None) -> None:
    threading.Thread(target=_outlive_parent, daemon=True).start()
    if output is not None:
        sys.stdout.flush()
        os.dup2(output, 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    scripts = list(entry_points(group="console_scripts", name=program))
    if not scripts:
        sys.stderr.write(f"`{program}` is not installed in this environment\n")
        sys.exit(NOT_INSTALLED)
    scripts[0].load()(arguments, prog_name=program)


def _outlive_parent() -> None:
    run = parent_process()
    assert run is not None
    run.join()
    os._exit(1)


def _outlive(process: int) -> None:
    while _is_alive(process):
        time.sleep(0.5)
    os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
