"""One self-contained page: text, tables and figures, nothing from a network."""

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; }
h1 { font-size: 1.6rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0;
       text-align: left; vertical-align: top } th { font-weight: 600 } td.n { text-align: right }
img { max-width: 100%; display: block; margin: .4rem 0 } .note { color: #59636e }
details { margin: .5rem 0 } pre { white-space: pre-wrap; background: #f6f8fa; padding: .5rem }
"""


class Page:
    """Collects parts of a page; everything given to it is escaped."""

    def __init__(self, title: str) -> None:
        """Begin with a title."""
        self.title, self.parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, note: str = "") -> None:
        """Begin a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")
        self.note(note)

    def note(self, text: str) -> None:
        """Add a remark."""
        if text:
            self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def figure(self, png: bytes, what: str) -> None:
        """Add a picture, described for those who cannot see it."""
        data = base64.b64encode(png).decode()
        self.parts.append(f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">')

    def table(self, rows: Mapping[str, object] | Sequence[Sequence[object]]) -> None:
        """Add a table: names and values, or rows of which the first is the head."""
        if isinstance(rows, Mapping):
            cells = "".join(
                f"<tr><th>{_cell(k)}</th><td>{_cell(v)}</td></tr>" for k, v in rows.items()
            )
        else:
            head, *body = rows
            cells = f"<tr>{''.join(f'<th>{_cell(c)}</th>' for c in head)}</tr>"
            for row in body:
                cells += f"<tr>{''.join(f'<td>{_cell(c)}</td>' for c in row)}</tr>"
        self.parts.append(f"<table>{cells}</table>")

    def details(self, summary: str, texts: Mapping[str, str]) -> None:
        """Add texts that are shown on a click."""
        inside = "".join(
            f"<p><b>{html.escape(name)}</b></p><pre>{html.escape(text)}</pre>"
            for name, text in texts.items()
        )
        self.parts.append(f"<details><summary>{html.escape(summary)}</summary>{inside}</details>")

    def render(self) -> str:
        """Return the whole page."""
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body>{''.join(self.parts)}</body></html>\n"
        )


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return html.escape(text)
