"""What `make docs` adds to the pages of this folder: the notebooks, with their outputs, as pages of their own.

A page links to ../notebooks/NAME.ipynb, which a forge shows; on the site the link leads to the page of the notebook.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=as_page(file)))
        files.append(File.generated(config, f"notebooks/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def as_page(file: Path) -> str:
    """A notebook as Markdown: text, code, and what the code gave."""
    parts: list[str] = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if len(parts) == 2:  # below the title, whose cell the installation stands before
                parts.append(f"[Download this notebook]({file.name})")
            continue
        parts.append(f"```python\n{source}\n```" if parts else "")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if kind := next((kind for kind in data if kind.startswith("image/")), None):
                parts.append(f'<img alt="" src="data:{kind};base64,{data[kind].strip()}">')
            elif "text/html" in data:
                parts.append("".join(data["text/html"]).replace("\n", " "))
            elif text:
                parts.append(f"<pre>{html.escape(text)}</pre>".replace("\n", "&#10;"))
    return "\n\n".join(parts)
