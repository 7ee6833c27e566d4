"""Runs notebooks and stores their outputs, made small: `python notebooks/execute.py [FILE...]`."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
WIDEST, COLOURS = 760, 128  # of a picture


def small(png: str) -> dict[str, str]:
    """A picture of an output with fewer pixels: JPEG, or PNG of few colours where that is smaller, as of plots."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        picture = image.convert("RGB")
    picture.thumbnail((WIDEST, 4 * WIDEST))
    plot, photograph = io.BytesIO(), io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(plot, "PNG", optimize=True)
    picture.save(photograph, "JPEG", quality=85, optimize=True)
    kind, content = min(("image/png", plot), ("image/jpeg", photograph), key=lambda pair: len(pair[1].getvalue()))
    return {kind: base64.b64encode(content.getvalue()).decode()}


def execute(file: Path) -> None:
    """Run a notebook from top to bottom in an empty folder, and write it with its outputs.

    Progress bars, times and paths of this machine are left out.
    """
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
        text = nbformat.writes(notebook).replace(folder, "work")
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            data.pop("image/jpeg", None)  # Pillow gives both
            if "image/png" in data:
                data.update(small(data.pop("image/png")))
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, file)
    print(file.name, file.stat().st_size // 1000, "kB", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        execute(Path(name))
