"""What ``inspect`` would have found of other models, made from what it has found of a tiny one."""

import copy
from typing import Any

Found = dict[str, Any]


def renamed(found: Found, names: list[str]) -> Found:
    """What was found, of targets with other names."""
    new = dict(zip(found["targets"], names, strict=True))

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {new.get(key, key): of(item) for key, item in value.items()}
        return [of(item) for item in value] if isinstance(value, list) else new.get(value, value)

    renamed_found: Found = of({**found, "recipe": {**found["recipe"], "content": {}}})
    return renamed_found


def large(found: Found, blocks: int) -> Found:
    """What would be found of the same model with more blocks: its last one again and again."""
    grown = copy.deepcopy(found)
    grown["units"] = {key: _grown(units, "unit", blocks) for key, units in grown["units"].items()}
    grown["tensors"] = _grown(grown["tensors"], "tensor", blocks)
    return grown


def _grown(items: list[Found], key: str, blocks: int) -> list[Found]:
    last = "model.layers.1"
    more = [
        copy.deepcopy({**item, key: item[key].replace(last, (block := f"model.layers.{number}")), "block": block})
        for number in range(2, blocks)
        for item in items
        if item[key].startswith(last)
    ]
    return [*items, *more]
