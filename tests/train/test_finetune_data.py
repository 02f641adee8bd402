"""Bad data is refused before a model is loaded, by file, line and reason; good data becomes the rows it says."""

import json

import pytest

from qlab.models import load
from qlab.train import finetune_methods
from qlab.train.evaluate import encode_items
from qlab.train.finetune import Settings, finetune
from qlab.train.finetune_data import labels_of, read_data
from qlab.train.finetune_tasks import Answers, Labels, Text
from qlab.train.tasks import Item

GOOD = b'{"prompt": "a", "answer": " b"}\n'
LABEL = b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
BAD = {  # name: (content, line, reason)
    "not utf-8": (GOOD + b'{"prompt": "\xff", "answer": "b"}\n', 2, r"is not UTF-8: byte 0xff at position 12"),
    "latin-1": (GOOD + '{"prompt": "é", "answer": "b"}'.encode("latin-1"), 2, "is not UTF-8"),
    "utf-16": (GOOD.decode().encode("utf-16"), 1, "is not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, 1, "starts with a byte order mark"),
    "not JSON": (GOOD + b"prompt: a\n", 2, r"is not JSON \(Expecting value, column 1\)"),
    "cut off": (GOOD + GOOD[:20], 2, "is not JSON"),
    "two objects": (GOOD[:-1] + GOOD, 1, "is not JSON .Extra data"),
    "an array over lines": (b"[\n" + GOOD + b"]\n", 1, "is not JSON"),
    "an array": (b'["a", "b"]\n', 1, "is a JSON list, not an object"),
    "a string": (GOOD * 2 + b'"a"\n', 3, "is a JSON str, not an object"),
    "null": (b"null\n", 1, "is a JSON NoneType, not an object"),
    "a blank line": (GOOD + b"\n" + GOOD, 2, "is blank"),
    "deep": (b"[" * 100_000, 1, "is nested too deep"),
    "a field twice": (b'{"prompt": "a", "answer": "b", "answer": "c"}\n', 1, "has the field 'answer' 2 times"),
    "NaN": (b'{"prompt": "a", "answer": NaN}\n', 1, "holds NaN, which is not JSON"),
    "infinity": (b'{"text": "a", "label": -Infinity}\n', 1, "holds -Infinity"),
    "no answer": (GOOD + b'{"prompt": "a"}\n', 2, "lacks 'answer'"),
    "no prompt": (b'{"answer": "a"}\n', 1, "lacks 'prompt'"),
    "label alone": (b'{"label": "a"}\n', 1, "lacks 'text'"),
    "other fields": (b'{"question": "a", "reply": "b"}\n', 1, "has the fields question, reply"),
    "no fields": (b"{}\n", 1, "has the fields none"),
    "a field too many": (b'{"prompt": "a", "answer": "b", "stpo": "c"}\n', 1, "has 'stpo', which nothing reads"),
    "kinds mixed": (GOOD + b'{"text": "a"}\n', 2, "is a row of kind 'text', and line 1 of kind 'answers'"),
    "labels missing later": (LABEL + b'{"text": "a"}\n', 3, "is a row of kind 'text', and line 1 of kind 'labels'"),
    "both kinds in one": (b'{"prompt": "a", "answer": "b", "text": "c"}\n', 1, "has 'text', which nothing reads"),
    "an empty answer": (GOOD + b'{"prompt": "a", "answer": ""}\n', 2, "'answer' is empty"),
    "an empty prompt": (b'{"prompt": " \\n", "answer": "a"}\n', 1, "'prompt' is empty"),
    "an empty stop": (b'{"prompt": "a", "answer": "b", "stop": ""}\n', 1, "'stop' is empty"),
    "a number": (b'{"prompt": "a", "answer": 7}\n', 1, r"'answer' is 7 \(int\), not text"),
    "a list": (b'{"text": ["a"]}\n', 1, r"'text' is \['a'\] \(list\), not text"),
    "a null": (b'{"text": null}\n', 1, r"'text' is None \(NoneType\), not text"),
    "a true label": (b'{"text": "a", "label": true}\n', 1, r"'label' is True \(bool\), not text or a whole number"),
    "half a label": (b'{"text": "a", "label": 0.5}\n', 1, r"'label' is 0.5 \(float\), not text or a whole number"),
    "labels of two types": (LABEL + b'{"text": "a", "label": 1}\n', 3, "the label is 1, and in line 1 'x'"),
    "half a pair": (b'{"text": "\\ud83d"}\n', 1, "'text' holds half of a surrogate pair"),
}
WHOLE = {  # name: (content, reason), of the file as a whole
    "nothing": (b"", "is empty: it has 0 bytes"),
    "ends of lines": (b"\n\n", "is empty: it has 2 bytes"),
    "one label": (b'{"text": "a", "label": "x"}\n' * 3, "every row has the label 'x'"),
}


@pytest.fixture
def no_model(monkeypatch):
    """What is refused early never comes to load a model."""

    def refused(*_):
        raise AssertionError("a model was loaded before the data was looked at")

    monkeypatch.setattr(finetune_methods, "load", refused)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_file_line_and_reason(tmp_path, no_model, name):
    content, line, reason = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line {line}: {reason}"):
        finetune(Settings("qlab-mini", "lora", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WHOLE)
def test_a_bad_file_is_refused(tmp_path, no_model, name):
    content, reason = WHOLE[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{reason}"):
        finetune(Settings("qlab-mini", "lora", path, tmp_path / "out"))


def test_what_is_no_file(tmp_path, no_model):
    with pytest.raises(FileNotFoundError, match=r"there is no data file .*rows\.jsonl"):
        finetune(Settings("qlab-mini", "lora", tmp_path / "rows.jsonl", tmp_path / "out"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_data(tmp_path)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: is not UTF-8"):
        read_data(bad)


@pytest.mark.parametrize(
    "content, reason",
    [
        (GOOD, r"test\.jsonl is of kind 'answers', and .*train\.jsonl of kind 'labels'"),
        (LABEL + b'{"text": "c", "label": "z"}\n', r"test\.jsonl, line 3: no row of .*train\.jsonl has the label 'z'"),
        (b'{"text": "c", "label": 1}\n', r"test\.jsonl, line 1: no row of .*train\.jsonl has the label 1"),
    ],
)
def test_data_to_evaluate_on_must_fit(tmp_path, no_model, content, reason):
    (tmp_path / "train.jsonl").write_bytes(LABEL)
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        finetune(Settings("m", "lora", tmp_path / "train.jsonl", tmp_path / "out", eval_data=tmp_path / "test.jsonl"))


def rows(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_data(path)


@pytest.fixture(scope="module")
def tokenizer():
    return load("qlab-mini")[1]


def test_rows_are_read_as_they_are(tmp_path):
    data = rows(tmp_path, {"prompt": "é\n", "answer": " ☃"}, {"prompt": "b", "answer": "c", "stop": "."})
    assert (data.kind, data.lines) == ("answers", [1, 2])
    assert data.rows == [{"prompt": "é\n", "answer": " ☃"}, {"prompt": "b", "answer": "c", "stop": "."}]
    (tmp_path / "windows.jsonl").write_bytes(GOOD.replace(b"\n", b"\r\n") + GOOD[:-1])
    assert read_data(tmp_path / "windows.jsonl").rows == [{"prompt": "a", "answer": " b"}] * 2
    numbers = rows(tmp_path, *({"text": "a", "label": n} for n in (10, 9, 10)))
    assert labels_of(numbers) == [9, 10] and labels_of(data) == []


def test_answers_are_encoded_as_they_are_scored(tmp_path, tokenizer):
    data = rows(
        tmp_path, {"prompt": "Question: a?\nAnswer:", "answer": " b"}, {"prompt": "1+1=", "answer": "2", "stop": "\n"}
    )
    task = Answers(tokenizer, 30)
    items = [Item("Question: a?\nAnswer:", " b", tokenizer.eos_token, "", ""), Item("1+1=", "2", "\n", "", "")]
    encoded = task.encode(data)
    assert encoded == encode_items(tokenizer, items)
    assert encoded[0][0][-1] == tokenizer.eos_token_id
    batch = task.collate(encoded)
    for row, (ids, prompt) in zip(range(2), sorted(encoded, key=lambda row: len(row[0])), strict=True):
        labels = batch["labels"][row].tolist()
        assert labels[prompt : len(ids)] == ids[prompt:]
        assert set(labels[:prompt]) | set(labels[len(ids) :]) == {-100}, "no loss on prompt and padding"


def test_answers_that_would_be_cut_are_refused(tmp_path, tokenizer):
    data = rows(tmp_path, {"prompt": "a", "answer": " b"}, {"prompt": "a b c d e f", "answer": " g"})
    whole = len(Answers(tokenizer, 99).encode(data)[1][0])
    Answers(tokenizer, whole).encode(data)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .* are {whole} tokens, and max_length is {whole - 1}"):
        Answers(tokenizer, whole - 1).encode(data)


def test_without_an_end_of_text_every_row_needs_a_stop(tmp_path):
    tokenizer = load("qlab-mini")[1]
    tokenizer.eos_token = None
    data = rows(tmp_path, {"prompt": "a", "answer": " b"})
    with pytest.raises(ValueError, match=r'rows\.jsonl: the tokenizer has no end of text, so every row needs a "stop"'):
        Answers(tokenizer, 30).encode(data)
    Answers(tokenizer, 30).encode(rows(tmp_path, {"prompt": "a", "answer": " b", "stop": "."}))


def test_text_is_one_stream_in_blocks(tmp_path, tokenizer):
    data = rows(tmp_path, {"text": "one two three"}, {"text": "four five"})
    stream = [
        i for text in ("one two three", "four five") for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    ]
    blocks = Text(tokenizer, 4).encode(data)
    kept = [i for ids, _ in blocks for i in ids]
    assert kept == stream[: len(kept)] and len(stream) - len(kept) <= 1
    assert all(len(ids) == 4 for ids, _ in blocks[:-1]) and all(prompt == 1 for _, prompt in blocks)
    (tmp_path / "a.txt").write_text("one two three\nfour", encoding="utf-8")
    assert read_data(tmp_path / "a.txt").rows == [{"text": "one two three\nfour"}]


def test_long_texts_are_cut_and_counted(tmp_path, tokenizer):
    data = rows(tmp_path, {"text": "a " * 50, "label": "x"}, {"text": "b", "label": "y"})
    task = Labels(tokenizer, 8, labels_of(data))
    encoded = task.encode(data)
    assert task.cut == 1 and len(encoded[0][0]) == 8 and [label for _, label in encoded] == [0, 1]
