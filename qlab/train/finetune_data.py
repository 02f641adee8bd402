"""Data files of a fine-tune: read whole and refused early, by file, line and reason, before any model is loaded.

| kind | a line of the JSONL file | trains |
|---|---|---|
| answers | {"prompt": "…", "answer": "…"}, and "stop" if it is not the tokenizer's end of text | a language model, on answer + stop |
| text | {"text": "…"}; or a .txt file, which is one document | a language model, on every token |
| labels | {"text": "…", "label": "…" or a whole number} | an encoder and a head |

The answer follows the prompt as it is: it begins with a space where the prompt ends without one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

KINDS = {  # kind → fields that a row has, fields that it may have
    "answers": (("prompt", "answer"), ("stop",)),
    "labels": (("text", "label"), ()),
    "text": (("text",), ()),
}
ROWS = '{"prompt": …, "answer": …}, {"text": …, "label": …} or {"text": …}'


@dataclass(frozen=True)
class Data:
    """A data file. rows : of one kind, in the file's order. lines : where each stands, from 1. sha256 : of the file."""

    path: Path
    kind: str
    rows: list[dict]
    lines: list[int]
    sha256: str

    def where(self, row: int) -> str:
        """ "train.jsonl, line 3" """
        return f"{self.path}, line {self.lines[row]}"


def read_data(path: str | Path, like: Data | None = None) -> Data:
    """Read a data file. like : the training data, for data to evaluate on: the same kind, and no label that it lacks.

    Raises FileNotFoundError, IsADirectoryError and ValueError, with file, line and reason.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the data file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    content = path.read_bytes()
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path}, line 1: starts with a byte order mark: save the file as UTF-8 without one")
    lines = [_text(path, number, line) for number, line in enumerate(content.split(b"\n"), start=1)]
    if not "".join(lines).strip():
        raise ValueError(f"{path} is empty: it has {len(content)} bytes and no row")
    rows = [{"text": "\n".join(lines)}] if path.suffix == ".txt" else _rows(path, lines)
    data = Data(path, _kind(rows[0]), rows, list(range(1, len(rows) + 1)), hashlib.sha256(content).hexdigest())
    _check_labels(data, like)
    return data


def labels_of(data: Data) -> list[str | int]:
    """The labels of the training data in their own order: a label's place is its number in the head. [] for other kinds."""
    return sorted({row["label"] for row in data.rows if "label" in row})


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: is not UTF-8: byte {line[error.start]:#04x} at position {error.start} ({error.reason})"
        ) from None


def _rows(path: Path, lines: list[str]) -> list[dict]:
    if lines[-1] == "":  # what follows the last end of line
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = _row(line)
            kind = _kind(row)
            if rows and kind != _kind(rows[0]):
                raise ValueError(
                    f"is a row of kind {kind!r}, and line 1 of kind {_kind(rows[0])!r}: use one file for each"
                )
            _check_fields(row, kind)
            if kind == "labels" and rows and type(row["label"]) is not type(rows[0]["label"]):
                raise ValueError(
                    f"the label is {row['label']!r}, and in line 1 {rows[0]['label']!r}: all text or all numbers"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def _row(line: str) -> dict:
    """The object of one line, once JSON holds it without doubt."""
    if not line.strip():
        raise ValueError("is blank: one JSON object a line")
    try:
        row = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno}): one whole object a line") from None
    except RecursionError:
        raise ValueError("is nested too deep: a row has fields and no lists") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}, not an object: a row is {ROWS}")
    return row


def _object(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"has the field {twice[0]!r} {names.count(twice[0])} times")
    return dict(pairs)


def _no_constant(name: str):
    raise ValueError(f"holds {name}, which is not JSON")


def _kind(row: dict) -> str:
    """The kind that the fields of a row say."""
    if "prompt" in row or "answer" in row:
        return "answers"
    if "label" in row:
        return "labels"
    if "text" in row:
        return "text"
    raise ValueError(f"has the fields {', '.join(row) or 'none'}: a row is {ROWS}")


def _check_fields(row: dict, kind: str) -> None:
    needed, optional = KINDS[kind]
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"lacks {missing[0]!r}: a row is {ROWS}")
    if unknown := [name for name in row if name not in (*needed, *optional)]:
        raise ValueError(f"has {unknown[0]!r}, which nothing reads: the fields are {', '.join((*needed, *optional))}")
    for name, value in row.items():
        if name == "label" and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, str):
            also = " or a whole number" if name == "label" else ""
            raise ValueError(f"{name!r} is {value!r} ({type(value).__name__}), not text{also}")
        if not (value if name == "stop" else value.strip()):  # a line's end is a good stop
            raise ValueError(f"{name!r} is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name!r} holds half of a surrogate pair, which is no character")


def _check_labels(data: Data, like: Data | None) -> None:
    if like is not None and data.kind != like.kind:
        raise ValueError(
            f"{data.path} is of kind {data.kind!r}, and {like.path} of kind {like.kind!r}: evaluate on the same"
        )
    if data.kind != "labels":
        return
    known = labels_of(like or data)
    if like is None and len(known) == 1:
        raise ValueError(f"{data.path}: every row has the label {known[0]!r}: there is nothing to tell apart")
    for number, row in enumerate(data.rows):
        if row["label"] not in known or type(row["label"]) is not type(known[0]):
            raise ValueError(f"{data.where(number)}: no row of {like.path} has the label {row['label']!r}")
