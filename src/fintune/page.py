"""One self-contained HTML page out of tables and figures.

It opens offline from a file: no script, no font, no image from elsewhere. Everything given is
escaped. It follows the reader's light or dark setting and reads well on a phone: charts (inline
SVG) shrink to its width, wide tables scroll inside their own frame.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from fintune.console import printable
from fintune.files import write_text

WIDTH = 440
"""Units of a chart's width: its 13-unit text has 10 pixels on a phone of 390, 16 on a desk."""

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A page runs no script and fetches nothing, whatever text of others stands in it."""


def escape(text: str) -> str:
    """Text of others for a page: HTML escaped, control and bidirectional characters shown."""
    return html.escape(printable(text))


class Page:
    """A page built from top to bottom; `save` writes it whole.

    Args:
        title: shown as the heading and in the browser's tab.
        lead: one sentence under it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self.text(lead)

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, *, dim: bool = False) -> None:
        """A paragraph."""
        self._parts.append(f"<p{' class=dim' if dim else ''}>{escape(text)}</p>")

    def cards(self, facts: Iterable[tuple[str, object]]) -> None:
        """The few numbers that matter, large: (label, value)."""
        inner = "".join(
            f"<div><dt>{escape(label)}</dt><dd>{escape(_show(value))}</dd></div>"
            for label, value in facts
        )
        self._parts.append(f"<dl class=cards>{inner}</dl>")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = ""
    ) -> None:
        """A table; cells that are numbers, and their columns' heads, are right-aligned."""
        body = [list(row) for row in rows]
        numeric = [
            bool(body) and all(_is_number(row[at]) for row in body) for at in range(len(columns))
        ]

        def cells(tag: str, values: Sequence[object]) -> str:
            return "".join(
                f"<{tag}{' class=n' if n else ''}>{escape(_show(value))}</{tag}>"
                for value, n in zip(values, numeric, strict=True)
            )

        lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
        head = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f"<div class=wide><table>{head}<thead><tr>{cells('th', columns)}</tr></thead>"
            f"<tbody>{lines}</tbody></table></div>"
        )

    def bars(
        self,
        labels: Sequence[str],
        series: dict[str, Sequence[float]],
        *,
        caption: str = "",
        unit: str = "",
    ) -> None:
        """Horizontal bars: one group a label, one bar a series (four at most), longest = 100 %."""
        top = max((value for values in series.values() for value in values), default=0) or 1
        labels = [label if len(label) <= 22 else label[:21] + "…" for label in labels]
        left = 16 + 8 * max((len(label) for label in labels), default=0)
        bar, gap, width = (14 if len(series) > 1 else 18), 10, WIDTH - left - 60
        parts, y = [], 4
        for at, label in enumerate(labels):
            middle = y + bar * len(series) / 2 + 4
            at_end = f'x={left - 8} y="{middle:.0f}" text-anchor=end'
            parts.append(f"<text {at_end}>{escape(label)}</text>")
            for number, values in enumerate(series.values()):
                length = max(1.0, width * values[at] / top) if values[at] else 0
                parts.append(
                    f"<rect class=s{number % 4} x={left} y={y} width={length:.1f} "
                    f"height={bar - 2} rx=2 />"
                    f'<text class=dim x="{left + length + 6:.1f}" y={y + bar - 4}>'
                    f"{escape(_show(values[at]) + unit)}</text>"
                )
                y += bar
            y += gap
        self._figure(parts, y, caption, list(series) if len(series) > 1 else [])

    def columns(
        self, edges: Sequence[float], series: dict[str, Sequence[float]], *, caption: str = ""
    ) -> None:
        """A histogram: `edges` has one number more than each series has values."""
        count, high, base = len(edges) - 1, 180, 196
        top = max((value for values in series.values() for value in values), default=0) or 1
        step = (WIDTH - 58) / max(1, count)
        wide = step * 0.9 / max(1, len(series))
        parts = [f"<line x1=36 x2={WIDTH} y1={base} y2={base} />"]
        for number, values in enumerate(series.values()):
            for at, value in enumerate(values):
                tall = high * value / top
                parts.append(
                    f'<rect class=s{number % 4} x="{38 + at * step + number * wide:.1f}" '
                    f'y="{base - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}">'
                    f"<title>{_show(edges[at])} to {_show(edges[at + 1])}: {_show(value)}</title>"
                    "</rect>"
                )
        every = max(1, -(-count // 8))
        for at in range(0, count + 1, every):
            parts.append(
                f'<text class=dim x="{38 + at * step:.1f}" y={base + 16} '
                f"text-anchor=middle>{_show(edges[at])}</text>"
            )
        parts.append(f"<text class=dim x=2 y=12>{_show(top)}</text>")
        self._figure(parts, base + 24, caption, list(series) if len(series) > 1 else [])

    def code(self, text: str) -> None:
        """Text shown as it is, wrapped."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def fold(self, summary: str, text: str) -> None:
        """Text behind a line that opens on a click or a key."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n<body><main>"
            + "\n".join(self._parts)
            + "</main></body></html>\n"
        )

    def save(self, path: Path) -> None:
        """Write the page whole."""
        write_text(path, self.html())

    def _figure(self, parts: list[str], height: float, caption: str, legend: list[str]) -> None:
        for number, name in enumerate(legend):
            parts.append(
                f'<rect class=s{number % 4} x={40 + number * 150} y="{height:.0f}" width=12 '
                f'height=12 rx=2 /><text x={58 + number * 150} y="{height + 10:.0f}">'
                f"{escape(name)}</text>"
            )
        height += 20 if legend else 0
        text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
            f'aria-label="{escape(caption)}">{"".join(parts)}</svg>{text}</figure>'
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | None) or str(value)[-1:] == "%"


def _show(value: object) -> str:
    """A cell's text: thousands separated, at most four significant digits after a point."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
