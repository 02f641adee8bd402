"""Charts as plain data: what an explorer's function returns, drawn alike by matplotlib and by the browser.

A chart is a dict of panels and readouts; a panel is a dict of axes and marks; a mark is a dict of numbers. Nothing here
draws. `picture.py` draws a chart with matplotlib and `explorer.js` draws the same chart in the browser.
"""

import math

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from qlab.teach.palette import colour


def _numbers(values, what):
    """A list of Python numbers with five significant digits; raises ValueError where one is not finite."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    array = np.atleast_1d(array).ravel()
    if array.dtype.kind in "iub":
        return [int(v) for v in array]
    array = array.astype(float)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {array.size} numbers are not finite, so they cannot be drawn")
    rounded = (float(f"{v:.5g}") for v in array)
    return [int(v) if v == int(v) and abs(v) < 1e15 else v for v in rounded]


def _mark(kind, role, label, at, **lists):
    colour(role)
    mark = {"kind": kind, "role": role, **{k: _numbers(v, f"{kind} mark, {k}") for k, v in lists.items()}}
    if label:
        mark["label"] = str(label)
    if at:
        mark["at"] = _numbers(at, f"{kind} mark, label position")
    return mark


def steps(edges, heights, role, label=None, *, fill=True, at=None):
    """A histogram: n + 1 bin `edges` and n `heights`, drawn as an outline, filled lightly unless fill=False."""
    mark = _mark("steps", role, label, at, x=edges, y=heights)
    if len(mark["x"]) != len(mark["y"]) + 1:
        raise ValueError(
            f"steps needs one edge more than heights; got {len(mark['x'])} edges and {len(mark['y'])} heights"
        )
    return mark | {"fill": bool(fill)}


def _xy(kind, x, y, role, label, at):
    mark = _mark(kind, role, label, at, x=x, y=y)
    if len(mark["x"]) != len(mark["y"]):
        raise ValueError(f"{kind} needs as many x as y; got {len(mark['x'])} and {len(mark['y'])}")
    return mark


def line(x, y, role, label=None, *, dashed=False, at=None):
    """A line through the points (x, y)."""
    return _xy("line", x, y, role, label, at) | {"dashed": bool(dashed)}


def points(x, y, role, label=None, *, at=None):
    """A dot at each (x, y)."""
    return _xy("points", x, y, role, label, at)


def stems(x, y, role, label=None, *, at=None):
    """A thin line from the bottom of the panel up to a dot at each (x, y): quantization levels and their use."""
    return _xy("stems", x, y, role, label, at)


def bars(x, y, role, label=None, *, width=0.8, at=None):
    """A bar from zero to y at each x; `width` in units of x."""
    return _xy("bars", x, y, role, label, at) | {"width": float(width)}


def vline(x, role="neutral", label=None, *, at=None):
    """A dashed vertical line through the whole panel at each x."""
    return _mark("vline", role, label, at, x=x)


def hline(y, role="neutral", label=None, *, at=None):
    """A dashed horizontal line through the whole panel at each y."""
    return _mark("hline", role, label, at, y=y)


def span(low, high, role="neutral", label=None, *, at=None):
    """A shaded band from x = low to x = high: a clipped tail, a dead zone."""
    return _mark("span", role, label, at, x=[low, high])


def text(x, y, words, role="neutral"):
    """Words centred on (x, y)."""
    return _mark("text", role, words, (x, y))


def _limits(marks, axis, scale):
    values = [v for m in marks for v in m.get(axis, ())]
    if scale == "log":
        values = [v for v in values if v > 0]
    if not values:
        return [0.1, 1] if scale == "log" else [0, 1]
    low, high = min(values), max(values)
    if scale == "log":
        return [low / 1.5, high * 1.5] if low < high else [low / 10, high * 10]
    if axis == "y" and low >= 0:
        return [0, high * 1.06 or 1]
    room = 0.03 * (high - low) or abs(high) or 1
    return [low - room, high + room]


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_text(value, digits=6):
    """A number as short text: 12,345 · 0.0031 · 2.07·10⁻⁵ · −4. `digits` significant digits."""
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{min(digits, 3) - 1}e}".split("e")
        return f"{float(mantissa):g}·10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")
    value = float(f"{value:.{digits}g}")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}").replace("-", "−")


def _power_text(value):
    """1, 10, 100, 0.1 in full, the other powers of ten as 10ⁿ."""
    power = round(math.log10(value))
    return f"{value:g}" if -1 <= power <= 2 else f"10{str(power).translate(SUPERSCRIPTS)}"


def _ticks(limits, scale):
    low, high = limits
    if scale == "log":
        places = [t for t in LogLocator(numticks=6).tick_values(low, high) if low <= t <= high]
        return [[float(f"{t:.6g}"), _power_text(t)] for t in places]
    places = [
        t
        for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(low, high)
        if low - 1e-9 * (high - low) <= t <= high + 1e-9 * (high - low)
    ]
    return [[float(f"{t:.6g}"), number_text(float(t))] for t in places]


def _axis(name, label, limits, scale, ticks, marks):
    if scale not in ("linear", "log"):
        raise ValueError(f"{name}scale is {scale!r}; use 'linear' or 'log'")
    limits = _limits(marks, name, scale) if limits is None else _numbers(limits, f"{name} limits")
    if len(limits) != 2 or not limits[0] < limits[1] or (scale == "log" and limits[0] <= 0):
        raise ValueError(f"{name} limits {limits} on a {scale} axis: give (low, high) with low < high, above 0 on log")
    if ticks is None:
        ticks = _ticks(limits, scale)
    else:
        ticks = [[_numbers(place, "tick")[0], str(words)] for place, words in ticks]
    return {"label": str(label), "limits": limits, "scale": scale, "ticks": ticks}


def panel(
    marks,
    xlabel,
    ylabel,
    *,
    xlim=None,
    ylim=None,
    xscale="linear",
    yscale="linear",
    xticks=None,
    yticks=None,
    title=None,
):
    """One set of axes. Labels carry their unit, e.g. "weight" or "SQNR (dB)".

    xlim, ylim: (low, high); found from the marks where None. In an explorer give both, so that the axes stand still
    while the slider moves. xticks, yticks: pairs (place, words), chosen where None. A mark's label is written above
    the panel in the mark's colour, or at the place `at=(x, y)` inside it.
    Raises ValueError on limits that are empty or, on a log axis, not positive.
    """
    marks = list(marks)
    return {
        "title": title,
        "x": _axis("x", xlabel, xlim, xscale, xticks, marks),
        "y": _axis("y", ylabel, ylim, yscale, yticks, marks),
        "marks": marks,
    }


def readout(name, value, unit="", digits=3):
    """One number under the chart, as ready text: `digits` significant digits, or digits="percent" for a share."""
    if isinstance(value, str):
        shown = value
    elif digits == "percent":
        shown, unit = f"{100 * float(value):.1f}", "%"
    elif isinstance(value, int):
        shown = f"{value:,}"
    else:
        shown = number_text(float(value), digits)
    return [str(name), f"{shown} {unit}".strip()]


def chart(*panels, readouts=()):
    """One or two panels side by side, with readouts under them. Returns plain data (dicts, lists, numbers, text)."""
    if len(panels) not in (1, 2):
        raise ValueError(f"a chart has one or two panels; got {len(panels)}")
    return {"panels": list(panels), "readouts": [r if isinstance(r, list) else readout(*r) for r in readouts]}
