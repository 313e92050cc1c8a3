"""How transformers would load tensors without data: which it misses, and which it does not expect."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Loaded", "Unloadable", "loaded", "numberless", "patterns"]

SHOWN = 6
"""Patterns of names that a message lists."""


class Unloadable(Exception):  # noqa: N818  no error: a class of its own may do without transformers
    """The model's class is not known, or cannot say what it loads."""


@dataclass(frozen=True)
class Loaded:
    """The report of ``from_pretrained``.

    Attributes:
        missing: Names of the model's tensors that would be random; tied ones are not among them.
        unexpected: Names that nothing in the model has.
        mismatched: Shape given and shape wanted of each tensor of another shape than the model's.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]]


def loaded(config: Any, tensors: Mapping[str, torch.Tensor], code: Any = None) -> Loaded:
    """Let transformers load a model from tensors without data.

    Args:
        config: The model's.
        tensors: By their names in the weight files; on torch's ``meta`` device, or moved there.
        code: mergekit's ``ModelPath`` of a model whose own code may be run; None for none.

    Raises:
        Unloadable: The model's class is not known, or cannot say what it loads.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        model_class, own_config = _model_class(config, code), deepcopy(config)
        state = {name: tensor.to("meta") for name, tensor in tensors.items()}
        options = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, info = model_class.from_pretrained(None, config=own_config, state_dict=state, **options)
    except Exception as error:  # a model's class may raise anything
        raise Unloadable(str(error)) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    mismatched = {str(name): (tuple(given), tuple(wanted)) for name, given, wanted in info["mismatched_keys"]}
    missing = frozenset(info["missing_keys"]) - mismatched.keys()
    return Loaded(missing, frozenset(info["unexpected_keys"]), dict(sorted(mismatched.items())))


def _model_class(config: Any, code: Any) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = config.architectures[0]
    for class_path in (getattr(config, "auto_map", None) or {}).values():
        if code is not None and str(class_path).endswith(f".{name}"):
            return get_class_from_dynamic_module(class_path, code.path, revision=code.revision)
    return getattr(transformers, name)


def numberless(name: str) -> str:
    """A tensor's name with its numbers replaced: ``model.layers.*.mlp.experts.*.up_proj.weight``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def patterns(names: Sequence[str]) -> str:
    """Names, shortened by pattern, and the number of tensors."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(numberless(name), []).append(name)
    shown = ", ".join(
        f"`{pattern}` ({len(own)})" if len(own) > 1 else f"`{own[0]}`"
        for pattern, own in list(members.items())[:SHOWN]
    )
    more = f" and {len(members) - SHOWN} more kinds" if len(members) > SHOWN else ""
    return f"{shown}{more}" if len(names) == 1 else f"{shown}{more}: {len(names)} tensors"
