"""A chart (chart.py) drawn by matplotlib: the static figure beside an explorer, and the live one when the kernel computes."""

import io
import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from qlab.teach.palette import GRID, INK, colour

WIDTH, HEIGHT, DPI = 9.0, 3.6, 110  # inches, inches, pixels per inch


class Picture:
    """One figure that can be redrawn: artists are kept and moved while the chart keeps its shape.

    The figure belongs to no pyplot state, so nothing leaks and nothing is shown twice.
    """

    def __init__(self, chart):
        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white", layout="none")
        FigureCanvasAgg(self.figure)
        self._shape = None
        self.draw(chart)

    def draw(self, chart):
        """Show `chart`; keeps the artists if every panel has the same kinds of marks with the same labels as before."""
        shape = [[_shape(m) for m in p["marks"]] for p in chart["panels"]]
        if shape != self._shape:
            self.figure.clear()
            self._axes = [self.figure.add_axes(box) for box in _boxes(len(chart["panels"]))]
            self._artists = [
                [_build(ax, m) for m in p["marks"]] for ax, p in zip(self._axes, chart["panels"], strict=True)
            ]
            for ax, p in zip(self._axes, chart["panels"], strict=True):
                _write_labels(ax, p)
            for part in itertools.chain.from_iterable(map(_parts, self._artists)):
                part.set_animated(True)  # left out of the background that png() keeps
            self._frames = [None] * len(self._axes)
            self._words = self.figure.text(
                0.5, 0.055, "", ha="center", va="center", fontsize=10.5, color=INK, linespacing=1.5, animated=True
            )
            self._shape = shape
        for i, (ax, artists, p) in enumerate(zip(self._axes, self._artists, chart["panels"], strict=True)):
            if self._frames[i] != (p["x"], p["y"]):
                _dress(ax, p)
                self._frames[i], self._background = (p["x"], p["y"]), None
            for artist, m in zip(artists, p["marks"], strict=True):
                _move(ax, artist, m)
        self._words.set_text(_lines([f"{name}: {value}" for name, value in chart["readouts"]]))
        return self

    def png(self, compression=6):
        """The picture as PNG bytes; less `compression` (0 to 9) makes them sooner and larger.

        Axes and words that stand still are drawn once and kept; only what moves is drawn again.
        """
        canvas, out = self.figure.canvas, io.BytesIO()
        if self._background is None:
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.figure.bbox)
        canvas.restore_region(self._background)
        for ax, artists in zip(self._axes, self._artists, strict=True):
            for part in _parts(artists):
                ax.draw_artist(part)
        self.figure.draw_artist(self._words)
        Image.fromarray(np.asarray(canvas.buffer_rgba())).save(out, "PNG", compress_level=compression)
        return out.getvalue()


def _parts(artists):
    """The matplotlib artists of a panel's marks, in drawing order."""
    for made in artists:
        for part in made.values():
            yield from part if isinstance(part, (list, tuple)) else [part]


def _shape(m):
    """What must stay the same for the artists of a mark to be moved: bars and rules also keep their number."""
    number = len(m.get("x", m.get("y", ()))) if m["kind"] in ("bars", "vline", "hline") else None
    return m["kind"], m["role"], m.get("label"), "at" in m, number


def _lines(parts, longest=105):
    """The readouts on as few lines as hold them."""
    lines = [""]
    for part in parts:
        wider = f"{lines[-1]}     {part}".strip()
        if len(wider) > longest:
            lines.append(part)
        else:
            lines[-1] = wider
    return "\n".join(lines)


def _boxes(n):
    width = 0.90 if n == 1 else 0.385
    return [(0.08 + i * (width + 0.13), 0.29, width, 0.55) for i in range(n)]


def _dress(ax, p):
    ax.set_xscale(p["x"]["scale"])
    ax.set_yscale(p["y"]["scale"])
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        axis.set_ticks([t for t, _ in p[name]["ticks"]], [w for _, w in p[name]["ticks"]], fontsize=10, color=INK)
        axis.set_ticks([], minor=True)
        axis.set_label_text(p[name]["label"], fontsize=11, color=INK)
    ax.set_xlim(p["x"]["limits"])
    ax.set_ylim(p["y"]["limits"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _write_labels(ax, p):
    x = 0.0
    y = 1.14 if p["title"] else 1.04
    if p["title"]:
        ax.text(0, y, p["title"], transform=ax.transAxes, fontsize=12, fontweight="bold", color=INK)
        y = 1.03
    scale = ax.get_position().width * WIDTH * 72
    for m in p["marks"]:
        if m.get("label") and "at" not in m:
            ax.text(x, y, m["label"], transform=ax.transAxes, fontsize=10.5, fontweight="bold", color=colour(m["role"]))
            x += (len(m["label"]) * 6.3 + 16) / scale


def _build(ax, m):
    c = colour(m["role"])
    kind = m["kind"]
    made = {}
    if kind == "steps":
        made["line"] = ax.stairs(m["y"], m["x"], color=c, linewidth=1.6)
        if m["fill"]:
            made["fill"] = ax.stairs(m["y"], m["x"], color=c, alpha=0.25, fill=True)
    elif kind == "line":
        made["line"] = ax.plot(m["x"], m["y"], color=c, linewidth=2, linestyle="--" if m["dashed"] else "-")[0]
    elif kind == "points":
        made["line"] = ax.plot(m["x"], m["y"], "o", color=c, markersize=5)[0]
    elif kind == "stems":
        made["stem"] = ax.vlines([], [], [], color=c, linewidth=1.2)
        made["line"] = ax.plot(m["x"], m["y"], "o", color=c, markersize=4)[0]
    elif kind == "bars":
        made["bars"] = ax.bar(m["x"], m["y"], width=m["width"], color=c)
    elif kind == "vline":
        made["rules"] = [ax.axvline(v, color=c, linewidth=1.4, linestyle="--") for v in m["x"]]
    elif kind == "hline":
        made["rules"] = [ax.axhline(v, color=c, linewidth=1.4, linestyle="--") for v in m["y"]]
    elif kind == "span":
        made["span"] = ax.axvspan(*m["x"], color=c, alpha=0.15, linewidth=0)
    if m.get("label") and "at" in m:
        made["text"] = ax.text(
            *m["at"], m["label"], color=c, fontsize=10.5, fontweight="bold", ha="center", va="center"
        )
    return made


def _move(ax, made, m):
    if "text" in made:
        made["text"].set_position(m["at"])
    kind = m["kind"]
    if kind == "steps":
        for artist in (made[k] for k in ("line", "fill") if k in made):
            artist.set_data(m["y"], m["x"])
    elif kind in ("line", "points", "stems"):
        made["line"].set_data(m["x"], m["y"])
        if kind == "stems":
            bottom = ax.get_ylim()[0]
            made["stem"].set_segments([np.array([[x, bottom], [x, y]]) for x, y in zip(m["x"], m["y"], strict=True)])
    elif kind == "bars":
        for patch, x, y in zip(made["bars"], m["x"], m["y"], strict=True):
            patch.set_x(x - m["width"] / 2)
            patch.set_width(m["width"])
            patch.set_height(y)
    elif kind == "vline":
        for rule, v in zip(made["rules"], m["x"], strict=True):
            rule.set_xdata([v, v])
    elif kind == "hline":
        for rule, v in zip(made["rules"], m["y"], strict=True):
            rule.set_ydata([v, v])
    elif kind == "span":
        made["span"].set_x(m["x"][0])
        made["span"].set_width(m["x"][1] - m["x"][0])
