import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from qlab.teach import ERROR, QUANTIZED, error_histogram, heat_map, level_diagram, style


@pytest.fixture(autouse=True)
def scratch_figures():
    with mpl.rc_context({"backend": "agg"}):
        style()
        yield
        plt.close("all")


def test_error_histogram_counts_every_weight():
    w = torch.randn(64, 32)
    ax = error_histogram(w, w.round(), scale=1.0)
    outline = next(p for p in ax.patches if not p.get_fill())
    values, edges, _ = outline.get_data()
    assert values.sum() == w.numel() and edges[0] >= -0.5 and edges[-1] <= 0.5
    assert mpl.colors.same_color(outline.get_edgecolor(), ERROR)
    assert "weight units" in ax.get_xlabel()
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(4,\)"):
        error_histogram(torch.zeros(2, 2), torch.zeros(4))


def test_level_diagram_shows_each_level():
    levels = torch.linspace(-1, 1, 16)
    ax = level_diagram(torch.randn(1000) / 3, levels, limits=(-1, 1))
    ticks = next(c for c in ax.collections if isinstance(c, mpl.collections.LineCollection))
    assert [s[0, 0] for s in ticks.get_segments()] == pytest.approx(levels.tolist())
    assert mpl.colors.same_color(ticks.get_color()[0], QUANTIZED)
    assert [t.get_text() for t in ax.texts] == ["weights", "16 levels"]


def test_heat_map_writes_numbers_and_marks_the_best():
    ax = heat_map(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), ["a", "b"], ["int4", "NF4"], unit="dB", best="high")
    assert [t.get_text() for t in ax.texts] == ["1.0", "2.0", "4.0", "3.0"]
    assert [t.get_fontweight() for t in ax.texts] == ["normal", "bold", "bold", "normal"]
    image = ax.images[0]
    assert image.norm(image.get_array()[0, 0]) == 1, "the lowest SQNR is the darkest"
    low = heat_map(np.array([[1.0, 2.0]]), ["a"], ["x", "y"], unit="MSE", best="low")
    assert low.texts[0].get_fontweight() == "bold"
    with pytest.raises(ValueError, match=r"\(2,\); 1 rows and 2 columns"):
        heat_map([1.0, 2.0], ["a"], ["x", "y"], unit="dB")
    with pytest.raises(ValueError, match="'low', 'high'"):
        heat_map([[1.0]], ["a"], ["x"], unit="dB", best="lowest")
