"""What a committed notebook must look like: executed in order, clean, small, and the same shape as its siblings."""

import ast
import re

import nbformat
import pytest

from .conftest import tags

PATHS = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|var|Users|mnt)/\w|site-packages|[A-Z]:\\\\")


@pytest.fixture
def notebook(notebook_path):
    return nbformat.read(notebook_path, as_version=4)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def texts(cell):
    """Everything readable in a cell: its source and its outputs, images left out."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/"))


def test_is_valid_and_small(notebook_path, notebook):
    nbformat.validate(notebook)
    size = notebook_path.stat().st_size
    assert size < 1_000_000, f"{size:,} bytes"
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", notebook_path.stem)


def test_was_run_top_to_bottom(notebook):
    counts = [c.execution_count for c in code(notebook) if c.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), f"execution counts {counts}: run make notebooks"
    assert any(c.outputs for c in code(notebook))


def test_outputs_are_clean(notebook):
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {i}: {output.ename}: {output.evalue}"
            assert output.get("name") != "stderr", f"cell {i} wrote to stderr: {output.text[:200]}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), f"cell {i}: a widget view"
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"


def test_names_no_machine(notebook):
    for i, cell in enumerate(notebook.cells):
        for text in texts(cell):
            found = PATHS.search(text)
            assert not found, f"cell {i} names a path: …{text[max(0, found.start() - 40) : found.end() + 40]}…"


def test_starts_with_a_question(notebook_path, notebook):
    title = notebook.cells[0].source.splitlines()[0]
    assert notebook.cells[0].cell_type == "markdown"
    number = int(notebook_path.stem[:2])
    assert re.match(rf"# 0?{number} · ", title), f"the title must start with '# {number} · ', it is {title!r}"
    assert title.endswith("?") or number == 0, f"the title must be a question, it is {title!r}"


def test_has_parameters(notebook):
    cells = [c for c in code(notebook) if "parameters" in tags(c)]
    assert len(cells) == 1, f"{len(cells)} cells are tagged parameters; one is needed"
    names = {t.id for node in ast.parse(cells[0].source).body if isinstance(node, ast.Assign) for t in node.targets}
    assert names >= {"MODEL", "DEVICE", "SEED", "FAST"}, f"the parameters cell sets only {sorted(names)}"


def test_source_style(notebook):
    for i, cell in enumerate(code(notebook)):
        assert not re.search(r"%%capture|warnings\.(simplefilter|filterwarnings)|TODO", cell.source), f"code cell {i}"


@pytest.mark.parametrize(
    "text, bad",
    [
        ("/home/ada/qlab", True),
        ("in /tmp/x", True),
        ("site-packages/torch", True),
        ("C:\\\\Users", True),
        ("weight/scale and 1/root", False),
        ("https://arxiv.org/home/x", False),
        ("https://example.org/usr/x", False),
    ],
)
def test_path_pattern(text, bad):
    assert bool(PATHS.search(text)) == bad
