"""One explorer: precomputed page, kernel widget, and what it refuses. Real browsers are in tests/browser."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from qlab.teach import Explorer, chart, line, panel, steps
from qlab.teach.explorer import MAX_STOPS

from .pages import charts_of

EDGES = np.linspace(-1, 1, 41)
W = np.random.default_rng(0).normal(0, 0.3, 2000)


def view(bits, kind):
    scale = 1 / 2 ** (bits - 1)
    w_hat = np.round(W / scale) * scale if kind == "round" else np.trunc(W / scale) * scale
    counts, reached = np.histogram(W, EDGES)[0], np.histogram(w_hat, EDGES)[0]
    return chart(
        panel([steps(EDGES, counts, "original"), steps(EDGES, reached, "quantized")], "weight", "weights per bin"),
        readouts=[("</script> error", np.abs(w_hat - W).max(), "weight units")],
    )


def pixels(png):
    return Image.open(io.BytesIO(png)).tobytes()


def explorer(**more):
    return Explorer(view, bits=range(1, 9), kind=["round", "truncate"], **more)


def test_every_stop_of_the_page_is_what_the_function_returns():
    e = explorer()
    charts = charts_of(e.html())
    assert len(charts) == e.size == 16
    for settings, chart_in_page in zip(e.grid(), charts, strict=True):
        assert chart_in_page == view(**settings)


def test_repeated_arrays_are_stored_once():
    page = explorer().html()
    edges = json.dumps(view(4, "round")["panels"][0]["marks"][0]["x"], separators=(",", ":"))
    assert page.count(edges) == 1
    assert len(page) < 40_000


def test_the_page_is_self_contained_and_safe():
    page = explorer().html()
    assert not re.search(r"https?://|src=|href=|require|import ", page)
    assert page.count("</script>") == 1, "text of the data must not end the script"
    assert page == explorer().html(), "the page must not change from run to run"
    assert page != explorer(start={"bits": 2}).html()


def test_controls_are_real_and_labelled():
    page = explorer(labels={"bits": "bits <per> weight"}, start={"bits": 3}).html()
    assert re.search(
        r'<label data-setting="bits"><span>bits &lt;per&gt; weight</span><input type="range".*?value="2">', page
    )
    assert page.count('type="radio"') == 2 and page.count(" checked") == 1
    assert 'aria-live="polite"' in page and 'role="img"' in page


def test_start_and_stops():
    e = explorer(start={"bits": 2})
    assert e.start == {"bits": 2, "kind": "round"}
    assert e.chart() == view(2, "round") and e.chart(kind="truncate") == view(2, "truncate")
    assert e.png() == e.png(bits=2) != e.png(bits=3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Explorer(view, bits=[1], kind=[]), "needs at least one stop"),
        (lambda: Explorer(view, bits=[1, 1], kind=["round"]), "no stop twice"),
        (lambda: Explorer(view, bits=[1, "two"], kind=["round"]), "mixes words and numbers"),
        (lambda: Explorer(view, bits=[1]), "cannot be called with the settings bits: missing a required argument"),
        (lambda: explorer(start={"bits": 9}), "bits=9 is not a stop of this explorer"),
        (lambda: explorer(start={"clip": 1}), "no setting 'clip'"),
        (lambda: explorer(labels={"bit": "x"}), "labels for"),
        (lambda: explorer().chart(bits=0), "not a stop"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_too_large_a_page_is_refused():
    def noisy(seed):
        y = np.random.default_rng(seed).normal(size=5000)
        return chart(panel([line(range(5000), y, "error")], "x", "y"))

    with pytest.raises(ValueError, match="use fewer stops, fewer bins, or live=True"):
        Explorer(noisy, seed=range(40)).html()


def test_large_grids_are_computed_in_the_kernel():
    def plain(a, b):
        return chart(panel([line([0, a], [0, b], "error")], "x", "y"))

    assert not Explorer(plain, a=range(1, 21), b=range(1, MAX_STOPS // 20 + 1)).live
    assert Explorer(plain, a=range(1, 22), b=range(1, MAX_STOPS // 20 + 1)).live
    assert Explorer(plain, a=[1], b=[1], live=True).live


def test_the_kernel_widget_draws_each_stop():
    box = explorer(live=True, start={"bits": 1}).widget()
    bits, kind, image, trouble = box.children
    for stop in range(8, 0, -1):
        bits.value, kind.value = stop, "truncate"
        assert pixels(image.value) == pixels(explorer().png(bits=stop, kind="truncate"))
    assert trouble.value == ""


def test_the_kernel_widget_shows_and_raises_what_the_function_raises():
    def fragile(bits):
        if bits == 3:
            raise RuntimeError("no three")
        return view(bits, "round")

    bits, image, trouble = Explorer(fragile, bits=range(1, 5), start={"bits": 1}, live=True).widget().children
    with pytest.raises(RuntimeError, match="no three"):
        bits.value = 3
    assert "no three" in trouble.value
    bits.value = 2
    assert trouble.value == "" and pixels(image.value) == pixels(explorer().png(bits=2, kind="round"))
