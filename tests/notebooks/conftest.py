"""How the tests run a notebook: with nbmake's runner, in a scratch folder, with or without the callback guard."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pytest_generate_tests(metafunc):
    if "notebook_path" in metafunc.fixturenames:
        metafunc.parametrize("notebook_path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(cell, prefix):
    """The names after `prefix` in the cell's tags: tagged(cell, "inline:") of the tag inline:scale is ["scale"]."""
    return [t.removeprefix(prefix) for t in tags(cell) if t.startswith(prefix)]


def exercises(notebook):
    """[(name, index of the stub, index of its check, solution code)] of a notebook, in order."""
    found = []
    for i, cell in enumerate(notebook.cells):
        for name in tagged(cell, "exercise:"):
            check = next((j for j in range(i + 1, len(notebook.cells)) if notebook.cells[j].cell_type == "code"), None)
            below = [c.source for c in notebook.cells[i + 1 :] if c.cell_type == "markdown" and "<details>" in c.source]
            code = re.search(r"```python\n(.*?)```", below[0], re.DOTALL) if below else None
            assert check is not None, f"exercise {name}: no code cell with its check after it"
            assert code, f"exercise {name}: no solution in <details> with a ```python block after it"
            found.append((name, i, check, code.group(1)))
    return found


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """run(notebook, guard=True) -> nbmake's NotebookResult (.nb, .error)."""
    from nbmake.nb_run import NotebookRun

    def run(notebook, guard=True):
        startup = tmp_path / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True, exist_ok=True)
        if guard:
            shutil.copy(HERE / "raise_in_callbacks.py", startup / "00_raise_in_callbacks.py")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        if "PYTEST_XDIST_WORKER" in os.environ:
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        path = tmp_path / "notebook.ipynb"
        nbformat.write(notebook, path)
        return NotebookRun(path, default_timeout=600, kernel="python3").execute()

    return run


def widget_errors(notebook):
    """Errors that a widget kept to itself: outputs of type error inside the saved widget state."""
    state = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    return [
        f"{output['ename']}: {output['evalue']}"
        for model in state.values()
        for output in model["state"].get("outputs", [])
        if output["output_type"] == "error"
    ]
