"""Runs the commands of a pipeline. None of them outlives the run.

A command of this program or of mergekit is a fork of the run, because importing torch and transformers takes
longer than a small stage. The run itself never uses the accelerator, because its forks could not use it then.
"""

import gc
import importlib
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from varm_common.errors import UserError
from varm_common.forked import run_module

__all__ = ["MERGEKIT", "OWN", "end_with_the_run", "output_of", "run_command"]

OWN = [sys.executable, "-m", "fusion_trainer"]
"""How a command of this program begins."""
MERGEKIT = ["mergekit-yaml"]
"""How a merge begins."""
STAGES = (
    "fusion_trainer.alignment.align",
    "fusion_trainer.representations.extract",
    "fusion_trainer.training.evaluate",
    "fusion_trainer.training.train",
)
FORKED = (
    (OWN, "fusion_trainer", STAGES),
    (MERGEKIT, "mergekit.scripts.run_yaml", ("mergekit.merge", "mergekit.options")),
)
"""How a command begins, the module it runs, and the modules to import before the fork."""
ENDS_WITH = "FUSION_TRAINER_ENDS_WITH"
"""Environment variable: the machine and the process number of the run that a command belongs to."""


def run_command(command: Sequence[str], lock: int | None) -> int:
    """Run a command to its end.

    Args:
        command: The program and its arguments.
        lock: A file descriptor that stays open in the command as long as it runs.

    Returns:
        The exit code; the negative signal number if a signal ended the command.

    Raises:
        UserError: There is no such program.
    """
    environment = {"PATH": _path(), ENDS_WITH: f"{platform.node()} {os.getpid()}"}
    for beginning, module, imports in FORKED:
        if list(command[: len(beginning)]) == beginning:
            return _forked(module, command[len(beginning) :], imports, environment)
    try:
        kept = () if lock is None else (lock,)
        return subprocess.run(command, env=os.environ | environment, pass_fds=kept, check=False).returncode
    except OSError as error:
        raise UserError(f"`{command[0]}` cannot be started: {error.strerror}; see `launch`") from error


def output_of(command: Sequence[str]) -> str:
    """The output of a program that is installed next to this one.

    Raises:
        UserError: The program is missing, printed nothing, or ended with an exit code other than 0 and 1.
    """
    environment = os.environ | {"PATH": _path()}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise UserError(f"`{command[0]}` cannot be started: {error.strerror}; install varm-merge again") from error
    if done.returncode not in (0, 1) or not done.stdout:
        raise UserError(
            f"`{' '.join(command[:2])}` ended with exit code {done.returncode}; see its message above. "
            "`varm-merge doctor` checks the installation."
        )
    return done.stdout


def end_with_the_run() -> None:
    """If this process belongs to a run on this machine, end as soon as that run has ended."""
    machine, _, process = os.environ.get(ENDS_WITH, "").rpartition(" ")
    if machine == platform.node():
        threading.Thread(target=_end_with, args=(int(process),), daemon=True).start()


def _path() -> str:
    """Programs beside this Python come first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _forked(module: str, arguments: Sequence[str], imports: Sequence[str], environment: dict[str, str]) -> int:
    from multiprocessing import get_context

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # finds GPUs without using them
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # the forks need not look through what was imported when they collect garbage
    process = get_context("fork").Process(target=_run_module, args=(module, arguments, environment))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    return process.exitcode or 0


def _run_module(module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Do as ``python -m module arguments``."""
    os.environ |= environment
    end_with_the_run()
    run_module(module, *arguments)


def _end_with(process: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    os._exit(1)
