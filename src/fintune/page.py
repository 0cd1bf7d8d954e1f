"""Self-contained HTML pages and Markdown, made from the templates of this package.

A page opens offline from a file: no script, no font, no image from elsewhere, and its policy
forbids them whatever text of others stands in it. It follows the reader's light or dark setting
and reads well on a phone: charts (inline SVG) shrink to its width, wide tables scroll.
"""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fintune.console import printable
from fintune.files import write_text


def save_page(path: Path, template: str, **values: Any) -> None:
    """Write a page whole: `template`.html.jinja with these values, every text of them escaped."""
    write_text(path, render(f"{template}.html.jinja", **values))


def render(template: str, /, **values: Any) -> str:
    """The text of a template; in HTML every value is escaped, elsewhere none."""
    return _ENVIRONMENT.get_template(template).render(values)


def _show(value: object) -> object:
    """A value as a page shows it: thousands separated, four digits, control characters shown."""
    if isinstance(value, jinja2.Undefined) or hasattr(value, "__html__"):
        return value
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return printable(str(value))


def breakable(cell: object) -> object:
    """A name that a narrow column may break behind a colon, as `rows.csv:label`."""
    return Markup(":<wbr>").join(printable(cell).split(":")) if isinstance(cell, str) else cell


def percent(value: float | None, sign: str = "") -> str:
    """A share in percent with one decimal."""
    return "–" if value is None else f"{100 * value:{sign}.1f} %"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("fintune"),
    autoescape=lambda name: str(name).endswith(".html.jinja"),
    finalize=_show,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"percent": percent, "breakable": breakable}
