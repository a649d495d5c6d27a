"""The notebooks run on a results directory, and hold no logic of their own."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def executed(results_directory):
    """The outputs of the code cells of tradeoff.ipynb."""
    notebook = nbformat.read(NOTEBOOKS / "tradeoff.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOOLOGY_RESULTS", str(results_directory))
        client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}})
        client.execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def test_the_plot_is_drawn(executed):
    assert len(executed[1][0]["data"]["image/png"]) > 20_000


def test_the_tables_have_the_points_and_slices(executed):
    slices, floors, seeds = (outputs[0]["data"]["text/plain"] for outputs in executed[2:])
    assert all(word in slices for word in ("attention", "based", "mean", "short", "long"))
    assert all(word in floors for word in ("majority", "position_only", "position_copy", "short", "long"))
    assert all(word in seeds for word in ("attention", "based", "num_seeds", "low", "high"))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_open_what_a_fresh_clone_has(path):
    """Every directory that is read by default holds committed records."""
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    defaults = re.findall(r'environ\.get\("\w+", "(.+?)"\)', code)
    assert defaults
    for folder in defaults:
        assert (NOTEBOOKS / folder).resolve().relative_to(NOTEBOOKS.parent).parts[:2] == ("experiments", "results")
        assert any((NOTEBOOKS / folder).rglob("*.json"))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_only_call(path):
    """No functions, classes, loops or conditions, and no outputs committed."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Lambda, ast.Try, ast.comprehension)
    for cell in code:
        source = cell.source.removeprefix("%matplotlib inline\n")
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]
        assert cell.outputs == []
        assert cell.execution_count is None
