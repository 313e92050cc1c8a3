"""The one kind of error a user of varm can cause."""

import click


class VarmError(click.ClickException, ValueError):
    """What is wrong, where, and what to do next, in words for the person who wrote the recipe.

    A ``ValueError`` for callers in Python; inside a click command (``mergekit-yaml``, ``varm-merge``) it
    ends the program with ``Error: …`` and exit code 1 instead of a traceback.
    """
