"""The matplotlib picture: kept artists must give the very picture that new ones would."""

import pytest

from qlab.teach import chart, panel, text
from qlab.teach.picture import Picture

from .test_chart import every_mark


def moved(shift, label="weights"):
    marks = every_mark()
    for m in marks:
        m["x"] = [v + shift for v in m.get("x", [])]
        if "at" in m:
            m["at"] = [m["at"][0] + shift, m["at"][1]]
        if m.get("label") == "weights":
            m["label"] = label
    return chart(panel(marks, "x", "y", xlim=(-1, 4), ylim=(0, 5)), panel([], "x", "y"), readouts=[("shift", shift)])


def test_moved_artists_equal_new_ones():
    picture = Picture(moved(0.0))
    axes = list(picture.figure.axes)
    assert picture.draw(moved(0.5)).png() == Picture(moved(0.5)).png()
    assert picture.figure.axes == axes, "the artists were built anew"
    assert picture.draw(moved(1.0)).png() != Picture(moved(0.5)).png()


def test_other_marks_are_built_anew():
    picture = Picture(moved(0.0))
    other = chart(panel([text(0.5, 0.5, "only words")], "x", "y"))
    assert picture.draw(other).png() == Picture(other).png()
    assert picture.draw(moved(0.0, label="changed")).png() == Picture(moved(0.0, label="changed")).png()


def test_every_mark_is_drawn():
    frame = {"xlim": (-1, 4), "ylim": (0, 5)}
    empty = Picture(chart(panel([], "x", "y", **frame))).png()
    for mark in every_mark():
        assert Picture(chart(panel([mark], "x", "y", **frame))).png() != empty, mark["kind"]


@pytest.mark.filterwarnings("error")
def test_style_of_the_notebook_does_not_disturb_it():
    import matplotlib as mpl

    from qlab.teach import style

    with mpl.rc_context():
        style()
        png = Picture(moved(0.0)).png()
    assert png.startswith(b"\x89PNG") and len(png) < 120_000
