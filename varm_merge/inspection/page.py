"""Pages that need nothing but themselves: one HTML file, opened from a disk, an e-mail or a server alike.

Styles, scripts and data stand inside the file, and its Content-Security-Policy lets a browser fetch nothing and
run nothing but the scripts that were put in here: a model's name can hold what it likes.

How to write another page: a template beside ``pages/base.html``, and two calls. ::

    {% extends "base.html" %}
    {% block title %}Comparison{% endblock %}
    {% block content %}<section>…</section>{% endblock %}
    {% block script %}{{ inline("comparison.js") }}{% endblock %}

    write(path, render("comparison.html", data=found, rows=rows))

What all pages share (``pages/look.css``, ``pages/look.js``):

- ``data``, if given, is the constant ``data`` of the script.
- ``table.sortable`` sorts by a click or Enter on a header, and says so by ``aria-sort``. It has one row in its
  ``thead``; ``td[data-value]`` sorts by that number and not by its text, ``th[data-unsorted]`` does not sort.
  Dashes and empty cells stay last.
- ``div.box`` around a table scrolls on a narrow screen: ``role="region" tabindex="0" aria-labelledby="…"``.
- ``section`` is a card, ``p.note`` a remark, ``p.warning`` one that matters, ``td`` a number unless ``td.text``.
- Colours are the variables at the head of ``look.css``; each has a light and a dark value. ``.heat`` with
  ``style="--share: 0.4"`` is a cell between the neutral colour (0) and the ends of the scale (-1, 1).
- ``{{ name | breakable }}`` may be broken after the points and underscores of its name.
- Write tables with all their rows: they stay where scripts do not run or have failed. ``.needs-script`` is hidden
  there and ``.without-script`` shown; the block ``without_script`` says what is missing.
"""

import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from varm_common.files import write_whole
from varm_merge.version import __version__

__all__ = ["render", "write"]


def render(template: str, **data: Any) -> str:
    """A whole page.

    Args:
        template: Its name in ``pages/``.
        data: What the template shows; ``data`` itself is also given to the page's script, as JSON.

    Raises:
        ValueError: ``data`` holds a number that JSON has no word for (NaN, Inf).
    """
    pages = PackageLoader("varm_merge.inspection", "pages")
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def inline(name: str) -> Markup:
        source, _, _ = pages.get_source(environment, name)
        return Markup(source)

    environment.filters |= {"json": _json, "hash": _hash, "breakable": _breakable}
    environment.globals |= {"inline": inline, "version": __version__, "data": {}}
    return str(environment.get_template(template).render(**data))


def write(path: Path, html: str) -> None:
    """Write a page so that it is there whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    write_whole(path, html.encode("utf-8", "replace"))  # a path may hold bytes that are no text


def _json(value: Any) -> Markup:
    """JSON that is safe inside ``<script>``: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _breakable(name: str) -> Markup:
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", name))


def _hash(script: str) -> str:
    """A script as Content-Security-Policy names it."""
    return f"sha256-{b64encode(hashlib.sha256(str(script).encode()).digest()).decode()}"
