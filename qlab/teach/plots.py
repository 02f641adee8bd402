"""Static figures of the suite, on matplotlib axes, in the palette's colours.

Each takes an optional `ax` and returns it, so that a lesson can put several side by side.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from qlab.teach.palette import ERROR, GRID, INK, NEUTRAL, ORIGINAL, QUANTIZED

HEAT = LinearSegmentedColormap.from_list("qlab-error", ["#FFFFFF", "#E3C7D8", "#A8558A", ERROR])


def style():
    """Set matplotlib's defaults for a notebook: legible sizes, light axes, inline pictures of 110 pixels per inch."""
    mpl.rcParams.update(
        {
            "figure.figsize": (9, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.bbox": None,
            "font.size": 11,
            "axes.labelsize": 11.5,
            "axes.titlesize": 12.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.labelsize": 10.5,
            "ytick.labelsize": 10.5,
            "axes.edgecolor": INK,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": GRID,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "lines.linewidth": 2,
            "axes.prop_cycle": mpl.cycler(color=[ORIGINAL, QUANTIZED, ERROR, NEUTRAL]),
            "legend.frameon": False,
            "axes.unicode_minus": True,
        }
    )


def _flat(values):
    array = values.detach().cpu().float().numpy() if hasattr(values, "detach") else np.asarray(values, dtype=float)
    return array.ravel()


def _axes(ax):
    return plt.subplots()[1] if ax is None else ax


def error_histogram(w, w_hat, scale=None, *, bins=101, ax=None, log=False):
    """Histogram of the quantization error w_hat − w, in weight units; both tensors have one shape.

    scale: the step between two levels, if there is one; marks ±scale/2, which rounding alone cannot pass.
    Raises ValueError where the shapes differ.
    """
    if tuple(w.shape) != tuple(w_hat.shape):
        raise ValueError(f"w has shape {tuple(w.shape)} and w_hat {tuple(w_hat.shape)}: an error needs equal shapes")
    ax, error = _axes(ax), _flat(w_hat) - _flat(w)
    counts, edges = np.histogram(error, bins=bins)
    ax.stairs(counts, edges, color=ERROR, fill=True, alpha=0.25)
    ax.stairs(counts, edges, color=ERROR, linewidth=1.6)
    if log:
        ax.set_yscale("log")
    if scale is not None:
        for side in (-0.5, 0.5):
            ax.axvline(side * float(scale), color=NEUTRAL, linestyle="--", linewidth=1.4)
        ax.text(
            0.5 * float(scale),
            0.97,
            " scale/2",
            color=NEUTRAL,
            va="top",
            fontweight="bold",
            transform=ax.get_xaxis_transform(),
        )
    ax.set(xlabel="error: dequantized − original (weight units)", ylabel="weights per bin")
    return ax


def level_diagram(w, levels, *, limits=None, bins=121, ax=None, label="levels"):
    """Quantization levels (1-D, weight units) as ticks on a number line, with the density of the weights w above.

    limits: (low, high) of the line; by default it holds every weight and every level.
    """
    ax, w, levels = _axes(ax), _flat(w), np.sort(_flat(levels))
    low, high = limits or (min(w.min(), levels[0]), max(w.max(), levels[-1]))
    room = 0.03 * (high - low)
    density, edges = np.histogram(w, bins=bins, range=(low, high), density=True)
    top = density.max()
    ax.stairs(density, edges, color=ORIGINAL, fill=True, alpha=0.25)
    ax.stairs(density, edges, color=ORIGINAL, linewidth=1.6)
    shown = levels[(levels >= low - room) & (levels <= high + room)]
    ax.vlines(shown, -0.16 * top, -0.03 * top, color=QUANTIZED, linewidth=2 if len(shown) < 80 else 0.8)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.text(0.01, 0.93, "weights", color=ORIGINAL, fontweight="bold", transform=ax.transAxes)
    ax.text(0.01, 0.83, f"{len(levels)} {label}", color=QUANTIZED, fontweight="bold", transform=ax.transAxes)
    ax.set(
        xlim=(low - room, high + room),
        ylim=(-0.2 * top, 1.1 * top),
        xlabel="weight",
        ylabel="density (1 / weight unit)",
    )
    ax.set_yticks([t for t in ax.get_yticks() if 0 <= t <= 1.1 * top])
    return ax


def heat_map(values, rows, columns, *, unit, title=None, digits=1, best=None, ax=None):
    """A table of numbers as colour and text: e.g. layer × format. values: (len(rows), len(columns)).

    Dark means worse. best: "low" (errors) or "high" (SQNR in dB) says which end is good, and marks each row's best in bold.
    Raises ValueError where the shape does not fit the names, or `best` is neither.
    """
    values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values has shape {values.shape}; {len(rows)} rows and {len(columns)} columns were named")
    if best not in (None, "low", "high"):
        raise ValueError(f"best is {best!r}; use 'low', 'high' or None")
    if ax is None:
        ax = plt.subplots(figsize=(min(9.5, 3 + 1.1 * len(columns)), 1.0 + 0.27 * len(rows)))[1]
    darkness = -values if best == "high" else values
    image = ax.imshow(darkness, cmap=HEAT, aspect="auto")
    for i, row in enumerate(values):
        winner = {"low": np.argmin, "high": np.argmax}[best](row) if best else -1
        for j, v in enumerate(row):
            dark = image.norm(darkness[i, j]) > 0.55
            ax.text(
                j,
                i,
                f"{v:.{digits}f}",
                ha="center",
                va="center",
                fontsize=9.5,
                fontweight="bold" if j == winner else "normal",
                color="white" if dark else INK,
            )
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows, fontsize=9.5)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_xlabel(unit)
    if title:
        ax.set_title(title)
    return ax
