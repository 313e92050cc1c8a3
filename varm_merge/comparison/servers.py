"""OpenAI-compatible servers that run the models of a comparison.

A server has loaded one model, or a few. Which server has which model is written by the user, by the names that the
models have in the report. What a server lists under ``/models`` is checked before a task is run there.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_common.endpoints import checked_url, key_from
from varm_common.errors import UserError, did_you_mean

__all__ = ["Servers"]

NAMED = re.compile(r"(?:(.+)=)?(https?://.+)")
"""A URL, or a model's name and a URL."""
TIMEOUT = 20.0
"""Seconds that a server may take to list its models."""


@dataclass(frozen=True)
class Servers:
    """The servers of the models.

    Attributes:
        urls: URLs without ``/completions``, by the model's name in the report; ``""`` is for all other models.
        key_variable: The environment variable with the servers' key.
    """

    urls: Mapping[str, str] = field(default_factory=dict)
    key_variable: str | None = None

    @classmethod
    def read(cls, given: Sequence[str], key_variable: str | None) -> "Servers":
        """The servers of ``NAME=URL`` or ``URL`` options.

        Raises:
            UserError: A URL is not one, contains a key, or two are for the same model; or the key is not set.
        """
        urls: dict[str, str] = {}
        for text in given:
            if not (match := NAMED.fullmatch(text)):
                raise UserError(f"--server-url: `{text}` is neither URL nor NAME=URL; a URL begins with http://")
            name, url = match.groups(default="")
            if name in urls:
                raise UserError(f"--server-url: two URLs for {f'`{name}`' if name else 'all models'}")
            urls[name] = checked_url(url, "--server-url")
        servers = cls(urls, key_variable)
        servers.key()
        return servers

    def key(self) -> str:
        """The servers' key; empty if they need none.

        Raises:
            UserError: The environment variable is not set.
        """
        return key_from(self.key_variable, "the server of --server-key-env")

    def demand_names(self, names: Iterable[str]) -> None:
        """Check that the URLs are for models of the comparison.

        Raises:
            UserError: One is not.
        """
        known = list(names)
        for name in self.urls:
            if name and name not in known:
                hint = did_you_mean(name, known, list_known=True)
                raise UserError(f"--server-url: no model of this comparison is called `{name}`{hint}")

    def url(self, name: str) -> str | None:
        """The server of a model; None if it has none."""
        return self.urls.get(name, self.urls.get(""))

    def served_name(self, name: str, folder: Path) -> str:
        """The name by which the server of a model serves it: that of the report, or the path of its folder.

        A server of this model alone may call it anything.

        Raises:
            UserError: The server does not answer, does not list the model, or has loaded another folder.
        """
        url = self.url(name)
        assert url is not None
        listed = {str(model["id"]): model for model in self._models(url)}
        wanted = next((text for text in (name, str(folder), str(folder.resolve())) if text in listed), None)
        if wanted is None and name in self.urls and len(listed) == 1:
            (wanted,) = listed
        if wanted is None:
            raise UserError(
                f"the server {url} lists {', '.join(sorted(listed)) or 'no model'}, but not `{name}`; serve "
                f"`{folder}` under this name (vLLM: --served-model-name {name}), or give --server-url {name}=URL"
            )
        root = listed[wanted].get("root")  # vLLM: the folder that was loaded
        if isinstance(root, str) and Path(root).is_dir() and Path(root).resolve() != folder.resolve():
            raise UserError(f"the server {url} has loaded `{root}`, not `{folder}`")
        return wanted

    def _models(self, url: str) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {key}"} if (key := self.key()) else {}
        try:
            request = urllib.request.Request(f"{url}/models", headers=headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                models = json.load(reply)["data"]
            return [model for model in models if model["id"]]
        except urllib.error.HTTPError as error:
            denied = error.code in (401, 403)
            advice = "name the variable with its key with --server-key-env" if denied else "is the URL right?"
            raise UserError(f"the server {url} answers {error.code} to {url}/models: {advice}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the server {url} does not answer, or lists no models: {error}") from error
