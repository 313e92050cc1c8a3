"""Commands of a run, as processes that do not outlive it.

Importing torch and transformers takes longer than many a small stage. The run imports once what all stages need,
and forks itself for each that is a command of this program, or mergekit's. It never touches the accelerator: a
fork of a process that has could not use it.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context, parent_process
from pathlib import Path

import psutil

from fusion_trainer.errors import FusionError

__all__ = ["MERGEKIT", "OWN", "end_with_the_run", "run_command"]

OWN = [sys.executable, "-m", "fusion_trainer"]
"""How a command of this program begins."""
MERGEKIT = ["mergekit-yaml"]
"""How a merge begins."""
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
        FusionError: There is no such program.
    """
    for known in (OWN, MERGEKIT):
        if list(command[: len(known)]) == known:
            return _forked(known, command[len(known) :])
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": programs, ENDS_WITH: f"{platform.node()} {os.getpid()}"}
    try:
        return subprocess.run(command, env=environment, pass_fds=(lock,), check=False).returncode
    except OSError as error:
        raise FusionError(f"`{command[0]}` cannot be started: {error.strerror}; see `launch`") from error


def end_with_the_run() -> None:
    """End this process as soon as the run it belongs to has ended, if it is a stage's and on the same machine."""
    machine, _, process = os.environ.get(ENDS_WITH, "").rpartition(" ")
    if machine == platform.node():
        threading.Thread(target=_outlive, args=(int(process),), daemon=True).start()


def _forked(program: Sequence[str], arguments: Sequence[str]) -> int:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for GPUs without touching them
    import fusion_trainer.warm  # noqa: F401

    process = get_context("fork").Process(target=_enter, args=(program, list(arguments)))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode or 0


def _enter(program: Sequence[str], arguments: list[str]) -> None:
    threading.Thread(target=_outlive_parent, daemon=True).start()
    if program == OWN:
        from fusion_trainer.cli import main

        main(arguments, prog_name="fusion-trainer")
    else:
        from mergekit.scripts.run_yaml import main as merge

        merge(arguments, prog_name="mergekit-yaml")


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
