"""A merge appears whole, or its folder stays as it was.

mergekit writes into a hidden folder inside the output folder, which is on the same disk. When weights, config and
tokenizer are all there they are moved: ``config.json`` last, and the old one is removed first, so that a folder
that was cut off between two files does not load instead of loading a mixture.
"""

import json
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

__all__ = ["copy_code", "staged"]

STAGE = ".unfinished-merge"
CONFIG = "config.json"


@contextmanager
def staged(out: Path, options: MergeOptions | None) -> Iterator[Path]:
    """The folder to write a merge to, whose files are moved to ``out`` at the end.

    A merge that fails or is stopped leaves nothing that was not there before. A signal that would end the process
    (SIGTERM, SIGHUP) ends the merge as Ctrl-C does.
    """
    cache = Path(options.lora_merge_cache) if options and options.lora_merge_cache else None
    cached = {*cache.iterdir()} if cache is not None and cache.is_dir() else set()
    new = next((path for path in reversed((out, *out.absolute().parents)) if not path.exists()), None)
    _remove(out / STAGE)  # of a merge that was killed
    place = out / STAGE / out.resolve().name  # the model card has that name
    try:
        with _signals(_stop):
            place.mkdir(parents=True)
            yield place
        with _signals(signal.SIG_IGN, "SIGINT"):
            _move(place, out)
    except BaseException:
        if new is not None:
            _remove(new)
        if cache is not None and cache.is_dir():
            for path in {*cache.iterdir()} - cached:
                if path.is_dir() and (not (chosen := weight_files(path)).names or chosen.problems):
                    _remove(path)
        raise
    finally:
        _remove(out / STAGE)


def copy_code(config: MergeConfiguration, place: Path) -> None:
    """Copy the base model's own code beside the merge: the modules that its ``auto_map`` names, and theirs.

    Code on the Hub is named with its repository, and is loaded from there.
    """
    reference = config.base_model or config.referenced_models()[0]
    folder = Path(reference.model.path)
    if not folder.is_dir():
        return
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        try:
            named = json.loads((place / file).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):
            continue
        for name in re.findall(r"'([\w.]+)\.\w+'", repr([*named.values()])):
            module = folder / f"{name}.py"
            found = [module, *map(Path, get_relative_import_files(module))] if module.is_file() else []
            for path in filter(Path.is_file, found):
                target = place / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def _move(place: Path, out: Path) -> None:
    written = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    for name in {CONFIG} & written.keys() | {FILE_NAME}:
        (out / name).unlink(missing_ok=True)
    for path in [*out.iterdir()]:
        another_tokenizer = path.name in TOKENIZER_FILES and not written.keys().isdisjoint(TOKENIZER_FILES)
        if path.name not in written and (WEIGHT_FILE.fullmatch(path.name) or another_tokenizer):
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
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", *more) if hasattr(signal, name)]
    own = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) in own}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)
