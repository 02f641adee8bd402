"""Formulas that a lesson re-derives in the open are held against qlab, so that the two cannot drift.

A cell tagged `inline:<name>` defines a function <name>. Its oracle is `ORACLES[<name>]` in oracles/nbNN.py: a function that is
given the lesson's function and asserts that it agrees with qlab.
"""

import importlib.util
import math
from pathlib import Path

import nbformat
import numpy
import pytest
import torch

from .conftest import tagged

HERE = Path(__file__).parent


def oracles(number):
    path = HERE / "oracles" / f"nb{number}.py"
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ORACLES


def inline_functions(notebook):
    """Run the tagged cells alone, in order: {name: function}."""
    space, names = {"torch": torch, "math": math, "np": numpy}, []
    for cell in notebook.cells:
        found = tagged(cell, "inline:")
        if found:
            exec(compile(cell.source, f"<inline {', '.join(found)}>", "exec"), space)
            names += found
    return {name: space[name] for name in names}


def test_inline_code_agrees_with_qlab(notebook_path):
    functions = inline_functions(nbformat.read(notebook_path, as_version=4))
    table = oracles(notebook_path.stem[:2])
    assert functions.keys() == table.keys(), (
        f"inline functions {sorted(functions)} and oracles {sorted(table)} must name the same functions"
    )
    for name, function in functions.items():
        table[name](function)


def test_a_drifted_formula_is_seen():
    cell = nbformat.v4.new_code_cell("def double(x):\n    return 3 * x", metadata={"tags": ["inline:double"]})
    function = inline_functions(nbformat.v4.new_notebook(cells=[cell]))["double"]

    def oracle(double):
        assert double(2) == 4

    with pytest.raises(AssertionError):
        oracle(function)
