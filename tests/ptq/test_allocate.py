"""Bits under a size budget: brute force on small cases, and cases large enough that only the bounds keep them fast."""

import importlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.ptq.allocate import allocate

module = importlib.import_module("qlab.ptq.allocate")  # the package has the function under that name
CHOICES = ("2", "3", "4", "8")


def brute_force(cost, size, budget):
    """(least total cost, its least size) over every combination that fits; None if none does."""
    found = []
    for choice in itertools.product(*(prices for prices in cost.values())):
        picked = list(zip(cost, choice, strict=True))
        if (total := sum(size[n][c] for n, c in picked)) <= budget:
            found.append((sum(cost[n][c] for n, c in picked), total))
    return min(found) if found else None


def totals(cost, size, chosen):
    return sum(cost[n][c] for n, c in chosen.items()), sum(size[n][c] for n, c in chosen.items())


@st.composite
def problems(draw, most_layers=5):
    """Integer costs, so that sums are exact and equal costs meet. Any order, any sign, sizes of 0 and equal ones."""
    cost, size = {}, {}
    for layer in range(draw(st.integers(1, most_layers))):
        labels = CHOICES[: draw(st.integers(1, 4))]
        cost[f"l{layer}"] = {label: draw(st.integers(-20, 20)) for label in labels}
        size[f"l{layer}"] = {label: draw(st.integers(0, 12)) for label in labels}
    return cost, size, draw(st.integers(-1, 60))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_brute_force(problem):
    cost, size, budget = problem
    best = brute_force(cost, size, budget)
    if best is None:
        with pytest.raises(ValueError, match="too small"):
            allocate(cost, size, budget)
    else:
        chosen = allocate(cost, size, budget)
        assert list(chosen) == list(cost)
        assert totals(cost, size, chosen) == best


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_equals_brute_force_on_real_costs(seed):
    rng = np.random.default_rng(seed)
    layers = [f"l{k}" for k in range(6)]
    cost = {n: dict(zip(CHOICES, (rng.lognormal(0, 3) * rng.random(4)).tolist(), strict=True)) for n in layers}
    size = {n: dict(zip(CHOICES, rng.integers(1, 10**6, 4).tolist(), strict=True)) for n in layers}
    low, high = (sum(end(s.values()) for s in size.values()) for end in (min, max))
    budget = int(low + rng.random() * (high - low))
    found, total = totals(cost, size, allocate(cost, size, budget))
    assert found == pytest.approx(brute_force(cost, size, budget)[0], rel=1e-12)
    assert total <= budget


def test_the_greedy_choice_is_not_good_enough():
    cost = {"a": {"small": 10, "large": 0}, "b": {"small": 9, "large": 0}, "c": {"small": 9, "large": 0}}
    size = {"a": {"small": 0, "large": 6}, "b": {"small": 0, "large": 5}, "c": {"small": 0, "large": 5}}
    # Per byte the first layer saves less, but alone it saves the most: 10 against 9.
    assert allocate(cost, size, 9) == {"a": "large", "b": "small", "c": "small"}
    assert allocate(cost, size, 10) == {"a": "small", "b": "large", "c": "large"}


def bits_problem(layers, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.integers(10**4, 10**7, layers)
    scales = rng.lognormal(0, 2, layers)
    cost = {f"l{k}": {b: float(s * 4.0**-b) for b in (2, 3, 4, 8)} for k, s in enumerate(scales)}
    size = {f"l{k}": {b: int(w) * b // 8 for b in (2, 3, 4, 8)} for k, w in enumerate(weights)}
    return cost, size


def test_two_hundred_layers_keep_few_sums_and_a_larger_budget_is_never_worse(monkeypatch):
    monkeypatch.setattr(module, "MOST", 10_000)  # there are 4^200 combinations
    cost, size = bits_problem(200)
    low, high = (sum(end(s.values()) for s in size.values()) for end in (min, max))
    before = math.inf
    for share in np.linspace(0, 1, 11):
        budget = math.ceil(low + share * (high - low))
        total, used = totals(cost, size, allocate(cost, size, budget))
        assert used <= budget and total <= before
        before = total
    assert before == pytest.approx(sum(c[8] for c in cost.values()))


def test_is_no_worse_than_any_uniform_choice_of_the_same_size():
    cost, size = bits_problem(40)
    for b in (2, 3, 4, 8):
        uniform = dict.fromkeys(cost, b)
        total, used = totals(cost, size, uniform)
        best = totals(cost, size, allocate(cost, size, used))[0]
        assert best <= total * (1 + 1e-12)
        assert b in (2, 8) or best < 0.9 * total


def test_of_equal_costs_the_smaller_wins():
    assert allocate({"a": {8: 1.0, 4: 1.0}}, {"a": {8: 100, 4: 50}}, 100) == {"a": 4}


def test_a_budget_may_fit_exactly_and_choices_may_be_anything_hashable():
    assert allocate({"a": {None: 0.0, ("int", 4): 1.0}}, {"a": {None: 8, ("int", 4): 1}}, 8) == {"a": None}


@pytest.mark.parametrize(
    "cost, size, budget, words",
    [
        ({"a": {4: 1.0}}, {"a": {4: 100}}, 99, "99 bytes is too small: .* takes 100 bytes"),
        ({"a": {4: 1.0}}, {"a": {4: 100}}, math.nan, "too small"),
        ({}, {}, 10, "no layers"),
        ({"a": {4: 1.0}}, {"b": {4: 1}}, 10, "only one has a, b"),
        ({"a": {4: 1.0}}, {"a": {8: 1}}, 10, r"costs for \[4\] and sizes for \[8\]"),
        ({"a": {}}, {"a": {}}, 10, "'a' has costs for"),
        ({"a": {4: math.nan}}, {"a": {4: 1}}, 10, "finite"),
        ({"a": {4: 1.0}}, {"a": {4: -1}}, 10, "at least 0"),
    ],
)
def test_refuses(cost, size, budget, words):
    with pytest.raises(ValueError, match=words):
        allocate(cost, size, budget)


def test_a_hard_case_is_refused_not_approximated(monkeypatch):
    monkeypatch.setattr(module, "MOST", 1000)
    rng = np.random.default_rng(0)
    size = {f"l{k}": dict(zip(CHOICES, rng.integers(1, 10**7, 4).tolist(), strict=True)) for k in range(12)}
    cost = {name: {label: -float(s) for label, s in sizes.items()} for name, sizes in size.items()}
    with pytest.raises(ValueError, match="partial sums"):
        allocate(cost, size, sum(max(s.values()) for s in size.values()) // 2)
