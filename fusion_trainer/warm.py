"""What every stage needs, imported once: the stages of a run are forked off a process that has done so."""

import fcntl
import os
import threading
import time
from pathlib import Path

import psutil

import fusion_trainer.alignment.align
import fusion_trainer.evaluate
import fusion_trainer.representations.extract
import fusion_trainer.train  # noqa: F401
from fusion_trainer.cli import main

__all__ = ["enter"]


def enter(arguments: list[str], parent: int, lock: Path) -> None:
    """Run a command of ``fusion-trainer`` in this process, which does not outlive the run and holds ``lock``."""
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    main(arguments, prog_name="fusion-trainer")


def _end_with(process: int) -> None:
    while psutil.pid_exists(process):
        time.sleep(0.2)
    os._exit(1)
