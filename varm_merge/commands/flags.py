"""Options and types of several commands, and the flags of mergekit-yaml for commands that do not merge."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]
READ = click.Path(exists=True, dir_okay=False, path_type=Path)
WRITTEN = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
PLACE = click.Path(path_type=Path)
CACHE = click.Path(file_okay=False)
DEVICE = click.Choice(["cpu", "cuda"])
COUNT = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, min_open=True)
MERGE_FLAGS = ("cache_dir", "lora_merge_cache", "trust_remote_code", "allow_crimes", "unsafe_truncate_embeddings")

option = functools.partial(click.option, show_default=True)
flag = functools.partial(click.option, is_flag=True)
with_json = flag("--json", "as_json", help="Print everything as JSON.")
with_by_name = flag("--by-name", help="Match tensors by name, as `varm-merge yaml --by-name` does.")
with_cache_dir = option("--cache-dir", type=CACHE, help="Where models from the Hub are stored.")
with_trust = flag("--trust-remote-code", help="Run code that comes with the models.")
with_device = option("--device", type=DEVICE, help="Default: cpu for merges, a GPU for scores if there is one.")


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Give a command several options, in this order."""
    return lambda command: functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)


def merge_flags(command: Command) -> Command:
    """Give a command these flags; it receives ``options``, mergekit's ``MergeOptions``, in place of them."""

    @with_cache_dir
    @option("--lora-merge-cache", type=CACHE, help="Where mergekit keeps merged LoRA adapters.")
    @with_trust
    @flag("--allow-crimes", help="Allow models of different architectures in one merge.")
    @flag("--unsafe-truncate-embeddings", help="Cut all vocabularies to the size of the smallest.")
    @functools.wraps(command)
    def with_merge_options(*arguments: Any, **values: Any) -> None:
        if values.get("offline"):
            from varm_merge.recipes.light_import import import_mergekit

            import_mergekit()
        from mergekit.options import MergeOptions

        flags = {name: values.pop(name) for name in MERGE_FLAGS}
        options = MergeOptions(transformers_cache=flags.pop("cache_dir"), **flags)
        command(*arguments, options=options, **values)

    return with_merge_options
