"""Imports mergekit's description of recipes and methods in a fraction of a second.

mergekit imports torch, transformers and peft, which takes seconds, and uses nothing of them before a merge is
planned. A check without models only needs mergekit's definition of a recipe and its methods' parameters. So empty
modules stand in for the large packages, and the rules are still mergekit's own.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["import_mergekit"]

HEAVY = ("torch", "transformers", "peft", "accelerate", "networkx", "numpy")
NOT_FOUND = "transformers.models.auto.modeling_auto"
"""A table of class names that mergekit does without."""
FULL_IMPORT = "VARM_MERGE_FULL_IMPORT"
"""Environment variable: 1 for the real packages."""


def import_mergekit() -> None:
    """Import mergekit without large packages, in a process that reads no model.

    If this mergekit cannot be imported so, the process starts again and imports everything.
    """
    if os.environ.get(FULL_IMPORT) == "1" or not sys.modules.keys().isdisjoint(HEAVY):
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        from mergekit import merge_methods

        import varm_merge.recipes.check  # noqa: F401  imports all that a check needs

        merge_methods.get("varm")
    except Exception:  # mergekit uses something that is not there
        os.environ[FULL_IMPORT] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.meta_path.remove(finder)


class _Finder:
    """Finds an empty module for every module of the large packages."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        is_heavy = name.partition(".")[0] in HEAVY and name != NOT_FOUND
        return ModuleSpec(name, self, is_package=True) if is_heavy else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _EmptyModule(ModuleType):
    """A module with a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Anything(name, (_Object,), {}))  # mergekit asks whether a type is torch.Tensor
        return vars(self)[name]


class _Anything(type):
    """A class with a class of every name."""

    __getattr__ = _EmptyModule.__getattr__


class _Object:
    """Made with any arguments; as a decorator it returns what it decorates."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __call__(self, decorated: Any) -> Any:
        return decorated
