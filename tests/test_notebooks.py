"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not of ours
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.cell_type == "code" for cell in content.cells)
    for cell in content.cells:
        assert not cell.get("outputs") or all(o.output_type != "error" for o in cell.outputs)


def test_there_are_notebooks_and_they_are_kept_without_outputs() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        for cell in nbformat.read(notebook, as_version=4).cells:
            assert not cell.get("outputs"), f"{notebook.name}: clear the outputs before committing"


def test_notebooks_use_what_people_can_import() -> None:
    for notebook in NOTEBOOKS:
        assert "diffrep.commands" not in notebook.read_text(), notebook.name
