"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not of ours
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.cell_type == "code" for cell in content.cells)
    for cell in content.cells:
        assert not cell.get("outputs") or all(o.output_type != "error" for o in cell.outputs)


def test_notebooks_are_stored_with_small_outputs_and_begin_with_the_installation() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert notebook.stat().st_size < 1_000_000, f"{notebook.name}: run notebooks/execute.py"
        install, title, *cells = nbformat.read(notebook, as_version=4).cells
        assert "%pip install" in install.source
        assert title.source.startswith("# ")
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), f"{notebook.name}: run notebooks/execute.py"
        kinds = {output.output_type for cell in code for output in cell.outputs}
        assert "error" not in kinds
        shown = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
        assert shown & {"image/png", "image/jpeg"}, notebook.name
        assert str(ROOT) not in notebook.read_text(encoding="utf-8")


def test_every_notebook_is_linked() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert all(f"(../notebooks/{notebook.name})" in page for notebook in NOTEBOOKS)
    assert "(docs/notebooks.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_notebooks_use_what_people_can_import() -> None:
    for notebook in NOTEBOOKS:
        assert "diffrep.commands" not in notebook.read_text(), notebook.name
