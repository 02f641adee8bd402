import base64
import io

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from qlab.teach.execute import clean, execute


def write(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(s, metadata={"tags": ["keep"], "x": 1}) for s in sources]), path)


def test_execute_writes_clean_outputs(tmp_path):
    path = tmp_path / "lesson.ipynb"
    write(path, "import ipywidgets\nipywidgets.IntSlider()", "6 * 7")
    assert execute(path) > 0
    notebook = nbformat.read(path, as_version=4)
    assert [c.execution_count for c in notebook.cells] == [1, 2]
    assert notebook.cells[1].outputs[0].data["text/plain"] == "42"
    assert notebook.cells[0].outputs == [], "a widget view without its state shows an error"
    assert notebook.cells[0].metadata == {"tags": ["keep"]}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_a_kernel_explorer_leaves_its_static_figure(tmp_path):
    path = tmp_path / "lesson.ipynb"
    write(
        path,
        "from qlab.teach import Explorer, chart, line, panel\n"
        "Explorer(lambda k: chart(panel([line([0, 1], [0, k], 'error')], 'x', 'y')), k=[1, 2], live=True)",
    )
    execute(path)
    (output,) = nbformat.read(path, as_version=4).cells[0].outputs
    assert set(output.data) == {"image/png", "text/plain"}


def test_a_failing_notebook_is_left_alone(tmp_path):
    path = tmp_path / "lesson.ipynb"
    write(path, "1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        execute(path)
    assert path.read_bytes() == before


def test_clean_keeps_what_a_reader_needs():
    cell = new_code_cell("x", metadata={"jupyter": {"source_hidden": True}, "execution": {"iopub.status": "now"}})
    assert clean(new_notebook(cells=[cell])).cells[0].metadata == {"jupyter": {"source_hidden": True}}


def test_pictures_get_smaller_and_look_the_same():
    figure, ax = plt.subplots()
    ax.plot(np.random.default_rng(0).normal(size=200), color="#0B5FA5")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    before = base64.b64encode(stream.getvalue()).decode()
    cell = new_code_cell("x", outputs=[new_output("display_data", {"image/png": before})])
    after = clean(new_notebook(cells=[cell])).cells[0].outputs[0].data["image/png"]
    assert len(after) < 0.8 * len(before)
    assert abs(pixels(after) - pixels(before)).max() <= 40 and abs(pixels(after) - pixels(before)).mean() < 0.2


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)
