"""The URL and key of a server that speaks the OpenAI protocol."""

import os
from urllib.parse import urlsplit

from varm_common.errors import UserError

__all__ = ["checked_url", "key_from", "without_key"]

LONGEST_REASON = 300


def checked_url(url: str, given_by: str) -> str:
    """The URL without a slash at its end.

    Args:
        url: What the user has given.
        given_by: The option, for messages.

    Raises:
        UserError: It has no http scheme, no host or an invalid port, or it contains a key.
    """
    parts = urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        valid = False
    if not valid:
        raise UserError(f"{given_by}: `{url}` must begin with http:// or https:// and a host")
    if parts.username or parts.password or parts.query:
        raise UserError(f"{given_by} contains a key; set it in an environment variable and name the variable")
    return url.rstrip("/")


def key_from(variable: str | None, of: str) -> str:
    """The key in an environment variable; empty if no variable is named.

    Raises:
        UserError: The variable is not set. ``of`` says whose key it is.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise UserError(f"{of} needs a key: set the environment variable {variable}")
    return key


def without_key(text: str, key: str) -> str:
    """A server's message on one line of limited length, without the key."""
    line = " ".join((text.replace(key, "[key]") if key else text).split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"
