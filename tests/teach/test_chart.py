import json
import math

import numpy as np
import pytest
import torch

from qlab.teach import bars, chart, hline, line, panel, points, readout, span, stems, steps, text, vline
from qlab.teach.chart import number_text


def every_mark():
    return [
        steps([0, 1, 2], [3, 4], "original", "weights"),
        line([0, 1], [1, 2], "quantized", dashed=True),
        points([1], [2], "error", "here", at=(1, 3)),
        stems([0.5, 1.5], [1, 2], "quantized"),
        bars([0, 1], [2, 1], "adapter"),
        vline([0.5, 1], label="limit"),
        hline(2),
        span(1.5, 2),
        text(1, 1, "words"),
    ]


def test_a_chart_is_plain_data():
    c = chart(panel(every_mark(), "x", "y"), readouts=[("SQNR", torch.tensor(21.34567), "dB")])
    assert json.loads(json.dumps(c, allow_nan=False)) == c
    assert c["readouts"] == [["SQNR", "21.3 dB"]]


def test_arrays_tensors_and_lists_are_alike():
    values = [0.5, 1.0, 2.25]
    made = [line(v, v, "error") for v in (values, np.array(values), torch.tensor(values, requires_grad=True))]
    assert made[0] == made[1] == made[2]
    assert made[0]["x"] == [0.5, 1, 2.25]
    assert line(torch.tensor([1, 2]), [0.123456789, 1], "error")["y"] == [0.12346, 1]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: steps([0, 1], [1, 2], "error"), "one edge more than heights; got 2 edges and 2 heights"),
        (lambda: line([0, 1], [1], "error"), "as many x as y; got 2 and 1"),
        (lambda: line([0, math.nan], [1, 2], "error"), "1 of 2 numbers are not finite"),
        (lambda: line([0], [1], "blue"), "no colour has the role 'blue'"),
        (lambda: panel([], "x", "y", xlim=(1, 1)), "low < high"),
        (lambda: panel([], "x", "y", ylim=(0, 1), yscale="log"), "above 0 on log"),
        (lambda: panel([], "x", "y", yscale="sqrt"), "'linear' or 'log'"),
        (lambda: chart(), "one or two panels; got 0"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_limits_hold_every_number():
    p = panel([line([-1, 3], [2, 8], "error"), vline(5)], "x", "y")
    assert p["x"]["limits"][0] <= -1 and p["x"]["limits"][1] >= 5
    assert p["y"]["limits"][0] == 0 and p["y"]["limits"][1] >= 8
    p = panel([line([1, 2], [0.001, 100], "error")], "x", "y", yscale="log")
    assert p["y"]["limits"][0] <= 0.001 and p["y"]["limits"][1] >= 100
    assert [words for _, words in p["y"]["ticks"]] == ["10⁻³", "10⁻²", "0.1", "1", "10", "100"]
    assert panel([], "x", "y", xticks=[(1, "query"), (2, "key")])["x"]["ticks"] == [[1, "query"], [2, "key"]]


def test_ticks_lie_inside_the_limits():
    for low, high in [(0, 1), (-0.77, 0.77), (1e-7, 3e-7), (-4e5, 9e5)]:
        ticks = panel([], "x", "y", xlim=(low, high))["x"]["ticks"]
        assert 3 <= len(ticks) <= 12
        assert all(low <= place <= high for place, _ in ticks)


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (0.00001234, "1.23·10⁻⁵"),
        (-0.5, "−0.5"),
        (12345.6, "12,346"),
        (1234567.0, "1.23·10⁶"),
        (math.inf, "inf"),
    ],
)
def test_number_text(value, shown):
    assert number_text(value) == shown


def test_readout():
    assert readout("bits", 4) == ["bits", "4"]
    assert readout("weights", 147456) == ["weights", "147,456"]
    assert readout("clipped", 0.0123, digits="percent") == ["clipped", "1.2 %"]
    assert readout("SQNR", math.inf, "dB") == ["SQNR", "inf dB"]
    assert readout("codes", "−7 … 7") == ["codes", "−7 … 7"]
