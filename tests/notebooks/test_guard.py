"""A notebook whose widget callback raises must fail the run; without the guard it passes, so the guard is what sees it."""

from pathlib import Path

import nbformat
import pytest

from .conftest import widget_errors

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.ipynb"))


@pytest.mark.parametrize("path", FIXTURES, ids=[p.stem for p in FIXTURES])
def test_guard_fails_a_raising_callback(path, run_notebook):
    result = run_notebook(nbformat.read(path, as_version=4))
    assert result.error is not None and result.error.failing_cell_index == 0
    assert "broken slider" in result.error.trace or "ZeroDivisionError" in result.error.trace


@pytest.mark.parametrize("path", FIXTURES, ids=[p.stem for p in FIXTURES])
def test_nbmake_alone_passes_it(path, run_notebook):
    result = run_notebook(nbformat.read(path, as_version=4), guard=False)
    assert result.error is None, "nbmake now sees this error by itself: the guard may be no longer needed"


def test_widget_state_shows_what_was_swallowed(run_notebook):
    path = Path(__file__).parent / "fixtures" / "output_raises.ipynb"
    assert widget_errors(run_notebook(nbformat.read(path, as_version=4), guard=False).nb) == [
        "RuntimeError: broken slider"
    ]


def test_widget_errors_reads_the_state():
    notebook = nbformat.v4.new_notebook(
        metadata={
            "widgets": {
                "application/vnd.jupyter.widget-state+json": {
                    "state": {
                        "a": {"state": {"outputs": [{"output_type": "error", "ename": "KeyError", "evalue": "'x'"}]}},
                        "b": {"state": {"value": 3}},
                    }
                }
            }
        }
    )
    assert widget_errors(notebook) == ["KeyError: 'x'"]
    assert widget_errors(nbformat.v4.new_notebook()) == []
