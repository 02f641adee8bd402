"""Checkers must say what is wrong: one typical mistake per line of the table."""

import re

import pytest
import torch

from qlab.teach import caught, check, claim, predict, score, table

W = torch.tensor([[0.7, -0.3, 0.25], [0.05, -0.65, 0.1]])


def codes(w, bits=4):
    return torch.round(w / 0.1).clamp(-7, 7)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda w: None, "gave None"),
        (lambda w: undefined_name, "raised NameError"),  # noqa: F821
        (lambda w: codes(w).flatten(), r"Wrong shape: expected \(2, 3\), got \(6,\)"),
        (lambda w: codes(w).T, "It is the transpose"),
        (lambda w: -codes(w), "sign is turned around"),
        (lambda w: codes(w) + 8, "off by the same amount, 8"),
        (lambda w: codes(w) * 0.1, "0.1 times the expected one"),
        (lambda w: torch.round(w / 0.1).clamp(-6, 6), r"range differs: expected −6 to 7, got −6 to 6"),
        (lambda w: (w / 0.1).clamp(-7, 7), "have a fraction"),
        (lambda w: torch.floor(w / 0.1 + 0.5), "off by exactly one code: look at how ties"),
        (lambda w: codes(w) / torch.zeros(()), "NaN or infinite"),
        (lambda w: codes(w).flip(1), "right numbers in the wrong order"),
        (lambda w: "codes", "this is str 'codes'"),
    ],
)
def test_check_says_what_is_wrong(wrong, words):
    w = torch.tensor([[0.7, -0.3, 0.25], [0.04, -0.62, 0.1]])
    card = check(wrong, codes, inputs=[(w,)], name="codes")
    assert card.passed is False and card.title == "codes: not yet"
    assert re.search(words, "\n".join(card.lines)), card.lines


def test_check_accepts_the_right_answer():
    assert check(codes, codes, inputs=[(W,), (-W,)]).passed
    assert check(0.5, 0.5).passed and check((W, 2), (W.clone(), 2)).passed
    assert check(0.50001, 0.5, tolerance=1e-3).passed and not check(0.50001, 0.5).passed
    assert repr(check(0.5, 0.5, name="the share")).startswith("the share: correct")


def test_check_counts_and_shows_the_first_wrong_input():
    card = check(lambda x: abs(x), lambda x: x, inputs=[(1,), (2,), (-3,)])
    assert "First wrong for the input -3." in card.lines and "2 of 3 inputs come out right." in card.lines


def test_suspects_name_the_mistake():
    suspects = {"You truncate.": lambda w: torch.trunc(w / 0.1).clamp(-7, 7), "You forgot the clamp.": 3}
    truncated = check(lambda w: torch.trunc(w / 0.1).clamp(-7, 7), codes, inputs=[(W * 0.9,)], suspects=suspects)
    assert truncated.lines == ["You truncate."]
    assert check(3, 4, suspects={"You forgot the sign bit.": 3}).lines == ["You forgot the sign bit."]


def test_check_does_not_let_the_answer_change_the_input():
    def careless(w):
        return w.div_(0.1).round_().clamp_(-7, 7)

    w = W.clone()
    assert check(careless, codes, inputs=[(w,), (w,)]).passed
    assert torch.equal(w, W)


def test_check_needs_inputs_and_values():
    with pytest.raises(ValueError, match="needs inputs"):
        check(codes, codes)
    assert check(3, codes, inputs=[(W,)]).lines == ["A function is asked for; this is int 3."]
    assert check((1,), (1, 2)).lines == ["2 values are asked for; this is a tuple."]
    assert check((1, 3.0), (1, 2.0)).lines[0].startswith("Value 2 of 2: ")
    assert not check(True, 1).passed and check("4 bits", "4 bits").passed


def test_caught_wants_a_test_that_sees_every_bug():
    def good(f):
        assert f(2.5) == 2 and f(-1) == 0

    bugs = {"no clamp": round, "rounds up": lambda x: max(0, int(x + 0.5))}
    assert caught(good, lambda x: max(0, round(x)), bugs).passed
    lines = caught(lambda f: None, lambda x: x, bugs).lines
    assert lines == [f"It accepts the right code, and lets this bug through: {name}." for name in bugs]
    assert "rejects the correct" in caught(lambda f: False, lambda x: x, bugs).lines[0]


def test_predict_and_score():
    assert "No guess yet" in repr(predict("How many?"))
    assert score(predict("How many?"), 7).passed is None
    assert score(predict("How many?", 7), 7).passed and score(predict("How many?", 8.0), 7).passed
    far = score(predict("How many?", 14, unit="codes"), 7)
    assert not far.passed and "2 times the measured value" in repr(far) and "Measured: 7 codes" in repr(far)
    assert "2 times too small" in repr(score(predict("How many?", 3.5), 7))
    assert "Off by 8" in repr(score(predict("How many?", -1), 7))
    assert score(predict("Which?", "a", options=["a", "b"]), "a").passed
    assert not score(predict("Which?", "b", options=["a", "b"]), "a").passed
    with pytest.raises(ValueError, match="not one of 'a', 'b'"):
        predict("Which?", "c", options=["a", "b"])
    with pytest.raises(TypeError, match="must be a number"):
        predict("How many?", "seven")


def test_claim_shows_evidence_and_verdict():
    card = claim("a < b", {"a": 0.00001234, "b": torch.tensor(3)}, holds=False, instead="a > b.")
    assert card.lines == ["a: 1.23·10⁻⁵", "b: 3", "Verdict: does not hold. a > b."]
    assert claim("x", {}, holds=torch.tensor(True)).passed is True
    assert "&lt;" in card._repr_html_() and "<b>" not in card._repr_html_()


def test_table():
    shown = table(["format", "SQNR (dB)"], [["int4", 9.5321], ["NF4", 10]], "Per tensor:").data
    assert shown.splitlines() == [
        "Per tensor:",
        "",
        "| format | SQNR (dB) |",
        "| :-- | --: |",
        "| int4 | 9.532 |",
        "| NF4 | 10 |",
    ]
    with pytest.raises(ValueError, match="2 columns"):
        table(["a", "b"], [[1]])
