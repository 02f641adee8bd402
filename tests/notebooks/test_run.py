"""Every committed notebook runs, its sliders hold what it computes now, and its exercises have a solution that passes."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from ..teach.pages import charts_of, pages
from .conftest import exercises, widget_errors


def with_solutions(notebook):
    """A copy with each solution, and its check once more, after the check; and the indices of those second checks."""
    notebook, seconds = copy.deepcopy(notebook), []
    for name, _, check, solution in reversed(exercises(notebook)):
        again = new_code_cell(notebook.cells[check].source)
        notebook.cells[check + 1 : check + 1] = [new_code_cell(solution), again]
        seconds.append((name, again.id))
    return notebook, seconds


def same_picture(a, b):
    """Equal to the eye: the same keys and words, each list of numbers within 2% of its largest.

    The slack is for machines whose float sums differ in the last digits, which moves single weights across bin edges.
    """
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same_picture(a[k], b[k]) for k in a if k != "readouts")
        )
    if isinstance(a, list):
        if not isinstance(b, list) or len(a) != len(b):
            return False
        if all(isinstance(v, (int, float)) for v in [*a, *b]):
            slack = 0.02 * max((abs(v) for v in [*a, *b]), default=0)
            return all(abs(x - y) <= slack for x, y in zip(a, b, strict=True))
        return all(map(same_picture, a, b))
    return a == b or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == pytest.approx(b, rel=0.02))


def test_notebook_runs(notebook_path, run_notebook):
    committed = nbformat.read(notebook_path, as_version=4)
    notebook, checks = with_solutions(committed)
    result = run_notebook(notebook)
    assert result.error is None, result.error.trace
    assert not widget_errors(result.nb)
    by_id = {cell.id: cell for cell in result.nb.cells}
    for name, id_ in checks:
        shown = "\n".join(o.get("data", {}).get("text/plain", "") for o in by_id[id_].outputs)
        assert ": correct" in shown, f"the solution of exercise {name} does not pass its own check:\n{shown}"
    before, now = ([charts_of(page) for page in pages(nb)] for nb in (committed, result.nb))
    assert len(before) == len(now), f"{len(before)} explorers are committed, {len(now)} came out: run make notebooks"
    for i, (a, b) in enumerate(zip(before, now, strict=True)):
        assert len(a) == len(b), f"explorer {i} has {len(a)} stops committed and {len(b)} now: run make notebooks"
        stale = [k for k, (x, y) in enumerate(zip(a, b, strict=True)) if not same_picture(x, y)]
        assert not stale, f"explorer {i}: stops {stale[:5]} of the committed notebook are stale: run make notebooks"


def test_staleness_is_seen():
    chart = {"panels": [{"marks": [{"x": [0, 100.0], "role": "error"}]}], "readouts": [["MSE", "1"]]}
    near, far, other = copy.deepcopy(chart), copy.deepcopy(chart), copy.deepcopy(chart)
    near["panels"][0]["marks"][0]["x"][1] = 101.0
    far["panels"][0]["marks"][0]["x"][1] = 104.0
    other["panels"][0]["marks"][0]["role"] = "original"
    assert same_picture(chart, near) and not same_picture(chart, far) and not same_picture(chart, other)
