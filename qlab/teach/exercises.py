"""Predict first, check after: the two ways a lesson asks the learner something."""

import math

from qlab.teach.cards import Card, plain
from qlab.teach.diagnose import diagnose


class Prediction:
    """What the learner expects, written down before the answer is shown. See `predict`."""

    def __init__(self, question, guess, options, unit):
        self.question, self.guess, self.options, self.unit = question, guess, options, unit

    def _card(self):
        if self.guess is None:
            ask = f"Choose one: {', '.join(self.options)}." if self.options else "Write a number"
            return Card(self.question, [f"No guess yet. {ask.rstrip('.')} in place of None, then run the cell again."])
        return Card(self.question, [f"Your guess: {plain(self.guess)} {self.unit}".strip()])

    def __repr__(self):
        return repr(self._card())

    def _repr_html_(self):
        return self._card()._repr_html_()


def predict(question, guess=None, *, options=None, unit=""):
    """Write down a guess: a number, or one of `options` (strings). None means not yet. Returns a Prediction for `score`.

    Raises ValueError where the guess is not one of the options, TypeError where it is not a number and no options are
    given.
    """
    if options and guess is not None and guess not in options:
        raise ValueError(f"the guess {guess!r} is not one of {', '.join(map(repr, options))}")
    if not options and guess is not None and not isinstance(guess, (int, float)):
        raise TypeError(f"the guess must be a number, got {guess!r} of type {type(guess).__name__}")
    return Prediction(question, guess, options, unit)


def score(prediction, measured, *, why="", factor=1.25):
    """Reveal the measured answer and score the guess. Returns a Card.

    A number counts as right within `factor` of the measured value (1.25: a quarter off); the card says how far off.
    """
    shown = f"Measured: {plain(measured)} {prediction.unit}".strip()
    lines = [shown, *([why] if why else [])]
    if prediction.guess is None:
        return Card(prediction.question, [*lines, "You wrote no guess: next time commit to one before you look."])
    guess = f"Your guess: {plain(prediction.guess)} {prediction.unit}".strip()
    if prediction.options:
        right, verdict = prediction.guess == measured, "Right." if prediction.guess == measured else "Not this time."
    else:
        right, verdict = _near(float(prediction.guess), float(measured), factor)
    return Card(prediction.question, [guess, shown, verdict, *lines[1:]], "right" if right else "wrong", right)


def _near(guess, measured, factor):
    if guess == measured:
        return True, "Exactly right."
    if guess * measured > 0:
        ratio = guess / measured
        right = max(ratio, 1 / ratio) <= factor
        if math.isclose(ratio, 1, rel_tol=5e-3):
            return True, "Right to within half a percent."
        way = f"{plain(ratio)} times the measured value" if ratio >= 1 else f"{plain(1 / ratio)} times too small"
        return right, ("Close: " if right else "Off: ") + way + "."
    return False, f"Off by {plain(abs(guess - measured))}."


def check(answer, expected, *, inputs=None, name="your answer", suspects=None, tolerance=0.0):
    """Compare the learner's answer with the expected one and say what is wrong, not only that it is. Returns a Card.

    answer, expected: values (numbers, tensors, tuples of them), or functions, called on each of `inputs`, a list of argument
    tuples. suspects: dict of explanation -> the value or function a typical mistake would give; if the answer equals
    it everywhere, the explanation is the diagnosis. tolerance: absolute; 0 asks for equality bit for bit.
    The card never raises for a wrong answer, so the notebook goes on; `card.passed` says how it went.
    """
    problem = diagnose(answer, expected, inputs, suspects or {}, tolerance)
    if problem is None:
        return Card(f"{name}: correct", [], "right", True)
    return Card(f"{name}: not yet", problem, "wrong", False)


def caught(test, right, bugs, *, name="your test"):
    """Check a learner's test: it must accept the right implementation and reject every planted bug. Returns a Card.

    test: function that takes an implementation and raises (AssertionError, or any error) where it finds a fault.
    bugs: dict of name -> broken implementation.
    """

    def rejects(implementation):
        try:
            return test(implementation) is False
        except Exception:
            return True

    if rejects(right):
        return Card(f"{name}: not yet", ["It rejects the correct implementation as well."], "wrong", False)
    missed = [bug for bug, implementation in bugs.items() if not rejects(implementation)]
    if missed:
        return Card(
            f"{name}: not yet",
            [f"It accepts the right code, and lets this bug through: {bug}." for bug in missed],
            "wrong",
            False,
        )
    return Card(
        f"{name}: correct", [f"It accepts the right code and catches {len(bugs)} of {len(bugs)} bugs."], "right", True
    )


def claim(statement, evidence, holds, *, instead=""):
    """The verdict card of a claim on trial. Returns a Card.

    statement: the claim as readings state it. evidence: dict of words -> measured value (never typed by hand).
    holds: what the measurement decided (bool, computed). instead: what to say in its place where it fails.
    """
    lines = [f"{words}: {plain(value)}" for words, value in evidence.items()]
    verdict = "Verdict: holds here." if holds else "Verdict: does not hold." + (f" {instead}" if instead else "")
    return Card(f"Claim on trial: “{statement}”", [*lines, verdict], "right" if holds else "wrong", bool(holds))
