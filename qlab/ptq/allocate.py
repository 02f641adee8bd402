"""Which layer gets how many bits: the least total cost whose total size fits a budget.

    minimize Σ_i cost_i(c_i)    subject to    Σ_i size_i(c_i) ≤ budget,    one choice c_i for each layer i

This is what the Pareto frontier of HAWQ-V2 is for (Dong et al. 2019, arXiv:1911.03852, section 2): costs Ω add up over the
layers, and so do bytes. It is the multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger, "Knapsack Problems",
2004, chapter 11), solved exactly, by dynamic programming with bounds:

- layer by layer, keep every partial sum (bytes, cost) that no other one beats in both: the Pareto frontier. Sums are at most
  as many as there are different totals of bytes, which repeated layer shapes keep few;
- drop a partial sum that cannot win. The layers still to come are relaxed: fractions of a choice are allowed, so their least
  cost is a convex, piecewise linear function of the bytes left, read off the lower convex hulls of their choices. Where that
  bound is worse than the best complete solution known (any partial sum, completed along the same hulls), no completion can
  win.

Costs like Ω fall ever more slowly as bytes are added, so that the bound is nearly always close: 200 layers with 4 choices each
leave thousands of partial sums. The hard case is a cost that is proportional to the bytes (subset sum): dozens of such layers
in sizes without a common pattern are refused, not approximated.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np

MOST = 3_000_000  # partial sums kept at a time, about 100 bytes each while they are extended


def allocate(
    cost: Mapping[str, Mapping[Hashable, float]],
    size: Mapping[str, Mapping[Hashable, int]],
    budget: int,
) -> dict[str, Hashable]:
    """layer → choice with the least total cost whose sizes sum to at most `budget`. Exact up to float rounding of the sums.

    cost: layer → choice → cost, such as Ω; negative ones are allowed. size: the same keys → bytes. budget: bytes.
    Of equal costs the smaller size is taken.

    Raises ValueError where even the smallest choices do not fit, naming both sizes, where cost and size have other keys, and
    for values that are not finite or sizes below 0, and where more than MOST partial sums are left to be tried.

    >>> cost = {"a": {"4 bits": 8.0, "8 bits": 1.0}, "b": {"4 bits": 3.0, "8 bits": 0.0}}
    >>> size = {"a": {"4 bits": 50, "8 bits": 100}, "b": {"4 bits": 50, "8 bits": 100}}
    >>> allocate(cost, size, 150)
    {'a': '8 bits', 'b': '4 bits'}
    """
    choices, sizes, costs = _checked(cost, size)
    smallest = sum(float(s.min()) for s in sizes)
    if not smallest <= budget:
        raise ValueError(
            f"the budget of {budget:,} bytes is too small: the smallest choice of every layer takes {smallest:,.0f} bytes "
            f"in {len(choices)} layers. Raise it, or offer fewer bits"
        )
    stages, rests = [], _rests(sizes, costs)
    spent, paid, best = np.zeros(1), np.zeros(1), np.inf
    # Bounds and sums are rounded apart: by this much the optimum may seem to lie above its own bound.
    slack = len(costs) * np.finfo(np.float64).eps * sum(np.abs(c).max() for c in costs)
    for s, c, rest in zip(sizes, costs, rests, strict=True):
        parent, choice = (a.ravel() for a in np.meshgrid(np.arange(len(spent)), np.arange(len(s)), indexing="ij"))
        spent, paid = spent[parent] + s[choice], paid[parent] + c[choice]
        left = budget - spent
        best = min(best, (paid + rest.reached(left)).min())
        kept = np.flatnonzero(paid + rest.bound(left) <= best + slack)
        kept = kept[_frontier(spent[kept], paid[kept])]
        if len(kept) > MOST:
            raise ValueError(
                f"{len(kept):,} partial sums of {len(stages) + 1} layers are neither beaten nor out of the race: round the sizes "
                "up to a common unit, or allocate for groups of layers"
            )
        spent, paid = spent[kept], paid[kept]
        stages.append((parent[kept], choice[kept]))
    place, picked = int(paid.argmin()), []
    for parent, choice in reversed(stages):
        picked.append(int(choice[place]))
        place = int(parent[place])
    return {name: labels[k] for (name, labels), k in zip(choices.items(), reversed(picked), strict=True)}


class _Rest(NamedTuple):
    """The layers still to come, relaxed. Going along the hulls, `bytes` spent (ascending) bring their cost down to `cost`."""

    bytes: np.ndarray
    cost: np.ndarray

    def bound(self, left: np.ndarray) -> np.ndarray:
        """No completion within `left` bytes costs less; inf where none fits."""
        return np.where(left < self.bytes[0], np.inf, np.interp(left, self.bytes, self.cost))

    def reached(self, left: np.ndarray) -> np.ndarray:
        """What one completion within `left` bytes does cost; inf where none fits."""
        place = np.searchsorted(self.bytes, left, side="right") - 1
        return np.where(place < 0, np.inf, self.cost[place])


def _rests(sizes: list[np.ndarray], costs: list[np.ndarray]) -> list[_Rest]:
    """For each layer, what follows it."""
    start_size = start_cost = 0.0
    steps, rests = np.empty((0, 2)), []
    for s, c in zip(reversed(sizes), reversed(costs), strict=True):
        # The steps of all hulls, the best bargain first. Each layer's own steps are in order already, as a hull's are.
        order = np.argsort(steps[:, 1] / steps[:, 0], kind="stable")
        path = np.vstack([[start_size, start_cost], steps[order]]).cumsum(0)
        rests.append(_Rest(path[:, 0], path[:, 1]))
        hull = _hull(s, c)
        start_size, start_cost = start_size + hull[0, 0], start_cost + hull[0, 1]
        steps = np.vstack([steps, np.diff(hull, axis=0)])
    return rests[::-1]


def _hull(s: np.ndarray, c: np.ndarray) -> np.ndarray:
    """(points, 2) of (size, cost): the lower convex hull of the choices, from the smallest down to the cheapest."""
    hull: list[np.ndarray] = []
    for k in _frontier(s, c):
        point = np.array([s[k], c[k]])
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _turns_up(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bool:
    """True where b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _frontier(s: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Indices of the pairs that no other beats in both, by ascending size; of equal pairs the first."""
    order = np.lexsort((c, s))
    falling = np.minimum.accumulate(np.append(np.inf, c[order]))[:-1]
    return order[c[order] < falling]


def _checked(cost, size):
    """(layer → its labels, sizes and costs as float64 arrays). Sums of bytes are exact below 2⁵³."""
    if not cost:
        raise ValueError("there are no layers to allocate bits to")
    if cost.keys() != size.keys():
        raise ValueError(
            f"cost and size are for other layers: only one has {', '.join(sorted(cost.keys() ^ size.keys()))}"
        )
    choices, sizes, costs = {}, [], []
    for name, prices in cost.items():
        if not prices or prices.keys() != size[name].keys():
            raise ValueError(f"{name!r} has costs for {list(prices)} and sizes for {list(size[name])}")
        choices[name] = list(prices)
        sizes.append(np.array([size[name][label] for label in prices], dtype=np.float64))
        costs.append(np.array(list(prices.values()), dtype=np.float64))
        if not (np.isfinite(sizes[-1]).all() and np.isfinite(costs[-1]).all() and (sizes[-1] >= 0).all()):
            raise ValueError(
                f"costs and sizes are finite numbers, sizes at least 0; {name!r} has {dict(prices)} and {dict(size[name])}"
            )
    return choices, sizes, costs
