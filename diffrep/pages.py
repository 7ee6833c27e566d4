"""HTML pages that need nothing but themselves: one escaping template engine, one content security policy.

Whatever a title, a label or a file name holds is shown as text. Data for a page's script go into a
``<script type="application/json">`` in which ``<``, ``>`` and ``&`` are escaped, and the policy lets a browser run
nothing but the script that the package carries.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from diffrep.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image


def render(template: str, *, title: str, style: str, script: str | None = None, **values: Any) -> str:
    """Fill a template of ``diffrep/templates``.

    Args:
        template: name of the file, which extends ``base.html``.
        title: of the page.
        style: name of the style sheet.
        script: name of the script, the only one that may run; None: none may.
        values: what the template shows; text is escaped, ``tojson`` makes data safe inside a script.

    Raises:
        jinja2.UndefinedError: the template needs a value that is missing.
    """
    from markupsafe import Markup

    sheet, code = _source(style), None if script is None else _source(script)
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src '{_digest(sheet)}'",
        f"script-src '{_digest(code)}'" if code else "script-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    values |= {"style": Markup(sheet), "script": None if code is None else Markup(code)}
    return _templates().get_template(template).render(title=title, policy="; ".join(policy), **values)


def data_uri(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG", **options: Any) -> str:
    """An image as text that a page can hold; `options` as `PIL.Image.Image.save` takes them."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass
class Page:
    """A report of pictures, text and tables, collected piece by piece; `save` writes it."""

    title: str
    lead: str
    _blocks: list[dict[str, Any]] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """Start a section."""
        self._blocks.append({"kind": "section", "text": title})
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def code(self, code: str) -> None:
        """Something to type."""
        self._blocks.append({"kind": "code", "text": code})

    def figures(self, figures: Sequence[tuple[Image.Image, str]], *, layout: Literal["", "wide", "small"] = "") -> None:
        """Pictures with captions, side by side where there is room.

        Args:
            figures: (picture, caption) each.
            layout: ``wide`` gives each picture a row, ``small`` puts six or so in one.
        """
        sources = [(data_uri(image), caption) for image, caption in figures]
        self._blocks.append({"kind": "figures", "figures": sources, "layout": layout})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> None:
        """A table; row `best` is set off."""
        self._blocks.append({"kind": "table", "header": header, "rows": rows, "best": best})

    def html(self) -> str:
        """The whole page."""
        return render("report.html", title=self.title, style="report.css", lead=self.lead, blocks=self._blocks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page at once: a file that is there is replaced only when the new one is whole."""
        write_whole(path, self.html())


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def _source(name: str) -> str:
    return resources.files("diffrep").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the policy calls an inline script or style sheet."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
