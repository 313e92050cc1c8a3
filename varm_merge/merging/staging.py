"""A merge appears whole, or its folder stays as it was.

mergekit writes into a hidden folder inside the output folder, which is on the same disk. When weights, config and
tokenizer are complete they are moved. The old ``config.json`` is removed first and the new one is moved last, so a
folder that was cut off between two files does not load.
"""

import json
import os.path
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers.dynamic_module_utils import get_relative_import_files

from varm_common.checkpoints import WEIGHT_FILE, weight_files
from varm_merge.merging.weight_log import FILE_NAME
from varm_merge.recipes.locate import TOKENIZER_FILES

__all__ = ["COPIED", "TEMPLATE", "copy_code", "staged"]

STAGE = ".unfinished-merge"
CONFIG = "config.json"
TOKENIZER = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "special_tokens_map.json",
    "merges.txt",
    "chat_template.jinja",
)
"""All files of a tokenizer."""
TEMPLATE = "chat_template.json"
"""The chat template of a processor, as older versions of transformers save it."""
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    TEMPLATE,
)
"""Files of the base model that are copied beside every merge; mergekit copies them for some recipes only."""


@contextmanager
def staged(out: Path, options: MergeOptions) -> Iterator[Path]:
    """The folder to write a merge to, whose files are moved to ``out`` at the end.

    A merge that fails or is stopped leaves nothing that was not there before. A signal that would end the process
    (SIGTERM, SIGHUP) ends the merge as Ctrl-C does.
    """
    cached = set(_folders(options.lora_merge_cache))
    new = next((path for path in reversed((out, *out.absolute().parents)) if not os.path.lexists(path)), None)
    _remove(out / STAGE)  # of a merge that was killed
    place = out / STAGE / out.resolve().name  # the name that mergekit gives the model card
    try:
        with _signals(_stop):
            place.mkdir(parents=True)
            yield place
        with _signals(signal.SIG_IGN, "SIGINT"):
            _move(place, out)
    except BaseException:
        if new is not None:
            _remove(new)
        for path in _folders(options.lora_merge_cache):
            if path not in cached and (not (chosen := weight_files(path)).names or chosen.problems):
                _remove(path)
        raise
    finally:
        _remove(out / STAGE)


def _folders(parent: str | None) -> list[Path]:
    return [path for path in Path(parent).glob("*") if path.is_dir()] if parent else []


def copy_code(config: MergeConfiguration, place: Path) -> None:
    """Copy the base model's own code beside the merge: the modules that its ``auto_map`` names, and their imports.

    Code on the Hub is named with its repository, and is loaded from there.
    """
    reference = config.base_model or config.referenced_models()[0]
    folder = Path(reference.model.path)
    if not folder.is_dir():
        return
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        try:
            classes = json.loads((place / file).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):
            continue
        for name in re.findall(r"'([\w.]+)\.\w+'", repr([*classes.values()])):
            module = folder / f"{name}.py"
            paths = [module, *map(Path, get_relative_import_files(module))] if module.is_file() else []
            for path in filter(Path.is_file, paths):
                target = place / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def _move(place: Path, out: Path) -> None:
    written = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    for name in {CONFIG} & written.keys() | {FILE_NAME}:
        (out / name).unlink(missing_ok=True)
    replaced = {*COPIED} if CONFIG in written else set()
    if not written.keys().isdisjoint(TOKENIZER_FILES):
        replaced |= {*TOKENIZER}
    for path in [*out.iterdir()]:
        if path.name not in written and (path.name in replaced or WEIGHT_FILE.fullmatch(path.name)):
            path.unlink()
    for name in sorted(written, key=lambda name: name == CONFIG):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        written[name].replace(out / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _stop(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _signals(handler: Callable[..., None] | signal.Handlers, *more: str) -> Iterator[None]:
    """Give SIGTERM and SIGHUP (and ``more``) a handler, where nobody else handles or ignores them."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", *more):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
