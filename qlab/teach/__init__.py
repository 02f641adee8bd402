"""What the learner touches: colours, figures, sliders, predictions, exercise checkers, verdicts on claims."""

from qlab.teach.cards import Card, table
from qlab.teach.chart import bars, chart, hline, line, panel, points, readout, span, stems, steps, text, vline
from qlab.teach.exercises import caught, check, claim, predict, score
from qlab.teach.explorer import Explorer
from qlab.teach.palette import ADAPTER, ERROR, NEUTRAL, ORIGINAL, QUANTIZED, ROLES, colour
from qlab.teach.plots import error_histogram, heat_map, level_diagram, style

__all__ = [
    "ADAPTER", "ERROR", "NEUTRAL", "ORIGINAL", "QUANTIZED", "ROLES", "Card", "Explorer", "bars", "caught",
    "chart", "check", "claim", "colour", "error_histogram", "heat_map", "hline", "level_diagram", "line",
    "panel", "points", "predict", "readout", "score", "span", "stems", "steps", "style", "table", "text", "vline",
]  # fmt: skip
