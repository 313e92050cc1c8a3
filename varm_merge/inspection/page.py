"""Pages that are one HTML file, without network: styles, scripts and data are inside.

The Content-Security-Policy of a page lets the browser load nothing and run only the scripts put in here, because a
model's name may contain anything. A page is a template in ``pages/`` that extends ``base.html``:

- ``data``, if given, is the constant ``data`` of its script; ``{{ inline("file.js") }}`` puts a file in.
- ``table.sortable`` sorts when a header is clicked; ``td[data-value]`` sorts by that number, ``th[data-unsorted]``
  does not sort. Dashes and empty cells stay last.
- ``div.box`` around a table scrolls on a narrow screen; ``section`` is a card; ``p.note`` and ``p.warning`` are
  remarks; a ``td`` is a number unless ``td.text``.
- Colours are the variables at the head of ``look.css``, with a light and a dark value. ``.heat`` with
  ``style="--share: 0.4"`` is a cell of a heat map, between -1 and 1.
- ``.needs-script`` is hidden where scripts do not run, ``.without-script`` is shown there.
"""

import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from varm_common.files import write_file
from varm_merge.version import __version__

__all__ = ["render", "write"]


def render(template: str, **data: Any) -> str:
    """A whole page.

    Args:
        template: Its name in ``pages/``.
        data: Variables of the template; the one called ``data`` is also given to the script, as JSON.

    Raises:
        ValueError: ``data`` contains NaN or Inf.
    """
    pages = PackageLoader("varm_merge.inspection", "pages")
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def inline(name: str) -> Markup:
        return Markup(pages.get_source(environment, name)[0])

    environment.filters |= {"json": _json, "hash": _hash, "breakable": _breakable}
    environment.globals |= {"inline": inline, "version": __version__, "data": {}}
    return str(environment.get_template(template).render(**data))


def write(path: Path, html: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    write_file(path, html.encode("utf-8", "replace"))  # a path may hold bytes that are no text


def _json(value: Any) -> Markup:
    """JSON that is safe inside ``<script>``: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _breakable(name: str) -> Markup:
    """A name that a browser may break after points, underscores and slashes."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", name))


def _hash(script: str) -> str:
    """A script as Content-Security-Policy names it."""
    return f"sha256-{b64encode(hashlib.sha256(str(script).encode()).digest()).decode()}"
