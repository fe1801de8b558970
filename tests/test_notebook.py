"""The notebook runs from top to bottom in a clean kernel, and was saved with its outputs."""

import nbformat
import pytest
from nbclient import NotebookClient


def test_notebook_was_saved_with_its_outputs(root):
    notebook = nbformat.read(root / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert (
        sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 2
    )


@pytest.mark.notebook
def test_notebook_runs(root, tmp_path):
    """As a reader would run it, but in a folder of its own: nothing is written beside the code."""
    notebook = nbformat.read(root / "notebook.ipynb", as_version=4)
    path = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(root)!r})")
    notebook.cells.insert(0, path)
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "loss 0.6931" in printed
    assert float(printed.split("gap closed in the end: ")[1].split("%")[0]) > 90
