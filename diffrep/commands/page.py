"""One self-contained HTML page of pictures, text and tables."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffrep.commands.output import write_image
from diffrep.files import write_whole

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2f7d5b; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
p { max-width: 48rem; }
.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.figures.wide { grid-template-columns: 1fr; }
figure { margin: 0; }
figure img { width: 100%; height: auto; border-radius: 6px; display: block; }
figcaption { font-size: .9rem; opacity: .85; margin-top: .35rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 650; color: var(--accent); }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
.scroll { overflow-x: auto; }
"""


@dataclass
class Page:
    """Collects a page piece by piece; `save` writes it."""

    title: str
    lead: str
    _parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, code: str) -> None:
        """Something to type."""
        self._parts.append(f"<pre><code>{html.escape(code)}</code></pre>")

    def figures(self, figures: Sequence[tuple[Image.Image, str]], *, wide: bool = False) -> None:
        """Pictures with captions, side by side where there is room; `wide` gives each a row."""
        items = "".join(
            f'<figure><img alt="{html.escape(caption)}" src="{data_uri(image)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for image, caption in figures
        )
        self._parts.append(f'<div class="figures{" wide" if wide else ""}">{items}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> None:
        """A table; row `best` is set off."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr{' class=best' if number == best else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for number, row in enumerate(rows)
        )
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def part(self, text: str, folder: Path) -> None:
        """A ready section in HTML; the pictures of `folder` that it shows go into the page."""
        for picture in re.findall(r'src="([^":]+)"', text):
            with Image.open(folder / picture) as image:
                text = text.replace(f'src="{picture}"', f'src="{data_uri(image)}"')
        self._parts.append(text)

    def save(self, path: Path) -> None:
        """Write the page at once: a file that is there is replaced only when the new one is whole."""
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style><h1>{html.escape(self.title)}</h1><p>{html.escape(self.lead)}</p>"
            + "\n".join(self._parts)
        )
        write_whole(path, text)


def written_figures(folder: Path, figures: Sequence[tuple[Image.Image, str, str]]) -> str:
    """Write pictures, given as (picture, file name, caption), into a folder: HTML of figures that show them."""
    items = ""
    for picture, file, caption in figures:
        write_image(folder / file, picture)
        text = html.escape(caption)
        items += f'<figure><img alt="{text}" src="{html.escape(file)}"><figcaption>{text}</figcaption></figure>'
    return items


def data_uri(image: Image.Image) -> str:
    """An image as text that a page can hold."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
