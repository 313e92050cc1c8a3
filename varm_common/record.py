"""A record says what an output was made from, so that it is made once and never taken for another one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_common.errors import UserError, demand_same, reason_of
from varm_common.files import read_mapping, write_json

__all__ = ["Record"]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A JSON file that says what an output was made from."""

    path: Path
    identity: Settings  # what the output depends on, as JSON; its `format` names the kind of output
    remedy: str  # what a user can do about a different output there
    compared: Callable[[Settings], Settings] = field(default=dict)  # the part of an identity that must agree

    def read(self) -> dict[str, Any] | None:
        """The record that is there, results included; None if there is none.

        Raises:
            UserError: It cannot be read, is of another format, or differs from ``identity``.
        """
        if not self.path.exists():
            return None
        try:
            content = read_mapping(self.path)
        except UserError as error:
            raise UserError(f"`{self.path}` holds something else: {error}.\n{self.remedy}.") from error
        if content.get("format") != self.identity["format"]:
            raise UserError(f"`{self.path}` holds something else.\n{self.remedy}.")
        try:
            earlier = self.compared({key: content.get(key) for key in self.identity})
        except (AttributeError, LookupError, TypeError) as error:
            raise UserError(f"`{self.path}` is damaged ({reason_of(error)}).\n{self.remedy}.") from error
        title = f"`{self.path}` was made with other settings:"
        demand_same(title, self.compared(self.identity), earlier, f"{self.remedy}.")
        return content

    def write(self, **results: Any) -> None:
        """Write identity and results."""
        write_json(self.path, {**self.identity, **results})
