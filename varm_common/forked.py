"""Run Python functions and modules in processes of their own, without importing their libraries each time.

The fork server of the standard library imports the libraries once. Each run is a fork of it, so runs do not affect
each other, also if one crashes. A run does not outlive this process.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from varm_common.process_usage import CommandError, dies_with_parent, last_lines, outcome

__all__ = ["run_forked", "run_module"]


def run_forked(
    function: Callable[..., object],
    *arguments: Any,
    log: Path,
    preload: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Call a function in a process of its own, and wait for its end.

    Args:
        function: A function of a module; it ends the process with ``sys.exit`` to report an error.
        arguments: What it is called with; they are pickled.
        log: The output of the process is appended to this file.
        preload: Modules that the fork server imports. Those of the first run in this process count.
        environment: The environment variables of the process; default the current ones.

    Raises:
        CommandError: The process failed; the message ends with its last lines of output.
    """
    # Libraries look for a GPU when they are imported. By NVML this does not start CUDA, which survives no fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    log.touch()
    begin = log.stat().st_size
    variables = dict(os.environ if environment is None else environment)
    process = context.Process(target=_run, args=(function, arguments, str(log), variables))
    try:
        process.start()
    except (ConnectionError, EOFError):  # the fork server has been killed and is not gone yet
        time.sleep(1)
        process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    if process.exitcode:
        with log.open("rb") as output:
            raise CommandError(f"{function.__name__} {outcome(process.exitcode)}:\n{last_lines(output, begin)}")


def run_module(module: str, *arguments: str) -> None:
    """Do what ``python -m module arguments`` does, in this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run(function: Callable[..., object], arguments: Sequence[Any], log: str, environment: dict[str, str]) -> None:
    dies_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
