"""Small framed notes in a notebook's output. They stay readable where a viewer strips the styles."""

from html import escape

from qlab.teach.chart import number_text
from qlab.teach.palette import ADAPTER, ERROR, NEUTRAL

COLOURS = {"right": ADAPTER, "wrong": ERROR, "note": NEUTRAL}


class Card:
    """A titled list of lines. `passed` is True, False, or None where there is nothing to judge."""

    def __init__(self, title, lines, kind="note", passed=None):
        self.title, self.lines, self.kind, self.passed = title, [str(line) for line in lines], kind, passed

    def __repr__(self):
        return "\n".join([self.title, *("  " + line for line in self.lines)])

    def _repr_html_(self):
        lines = "".join(f"<br>{escape(line)}" for line in self.lines)
        return (
            f'<div style="border-left:5px solid {COLOURS[self.kind]};padding:4px 12px;margin:4px 0;'
            f'max-width:52em;background:#fff;color:#1A1A1A"><strong>{escape(self.title)}</strong>{lines}</div>'
        )


def plain(value, digits=4):
    """A number as short text of `digits` significant digits; anything else as its str()."""
    if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1:
        value = value.item()
    if isinstance(value, float):
        return number_text(value, digits)
    return f"{value:,}" if type(value) is int else str(value)


def table(header, rows, caption=""):
    """A Markdown table to display. header: column names; rows: lists of text or numbers (four significant digits).

    Columns whose first entry is a number, or text that starts like one, are set to the right.
    """
    from IPython.display import Markdown

    rows = [[plain(v) for v in row] for row in rows]
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"{len(header)} columns are named; the rows have {sorted({len(row) for row in rows})} entries")
    right = [bool(rows) and rows[0][i].lstrip("*+-−±")[:1].isdigit() for i in range(len(header))]
    lines = [header, ["--:" if r else ":--" for r in right], *rows]
    return Markdown(
        "\n".join(([caption, ""] if caption else []) + [f"| {' | '.join(map(str, row))} |" for row in lines])
    )
