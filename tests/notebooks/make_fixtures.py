"""Writes tests/notebooks/fixtures/*.ipynb, the notebooks whose widget callbacks raise: `python make_fixtures.py`."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

CALLBACKS = {
    "interact_raises": "from ipywidgets import interact\n\n\n"
    "@interact(bits=(1, 8))\ndef draw(bits=4):\n    raise RuntimeError('broken slider')",
    "interactive_raises_later": "from ipywidgets import interactive\n\n\n"
    "def draw(bits=4):\n    return 1 / (bits - 7)\n\n"
    "sliders = interactive(draw, bits=(1, 8))\nsliders.children[0].value = 7",
    "output_raises": "from ipywidgets import Output\n\nout = Output()\nwith out:\n"
    "    raise RuntimeError('broken slider')",
}

if __name__ == "__main__":
    for name, source in CALLBACKS.items():
        notebook = new_notebook(cells=[new_code_cell(source, id="raises"), new_code_cell("'reached'", id="after")])
        nbformat.write(notebook, Path(__file__).parent / "fixtures" / f"{name}.ipynb")
