"""k-means: first centres by k-means++, then Lloyd's iterations; for vectors, and much faster for numbers on a line.

Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding", section 2.2, in the greedy
form that its authors suggest (t draws for each centre, the best is kept), with scikit-learn's t = 2 + ⌊ln k⌋.
Lloyd 1982, "Least Squares Quantization in PCM", method I.

    J = Σ ‖x − nearest centre‖²        is lowered by turns:
    assign each point to its nearest centre, then move each centre to the mean of its points

Neither step can raise J. A centre left without points moves to the point farthest from its own centre, which lowers J.
While two different points share a centre and another centre is empty, that goes on: at the end, at most k different
points have a centre each.

Numbers on a line need no n × k distances: the points of a centre are a stretch of the sorted numbers. Bisection finds its
ends, and prefix sums of x and x² give its mean and its share of J. An iteration costs k · log n, not n · k.

Axis legend: B = independent problems, n or N = points, d = their dimension, k = centres, t = trials of greedy k-means++.
"""

import math

import numpy as np
import torch
from torch import Tensor

TABLE = 1 << 17  # distances held at once: 1 MiB, near the caches


def _draws(k: int, seed: int) -> Tensor:
    """(k, t) float64 in [0, 1). One set for all problems of a batch: what is drawn for one does not depend on the others."""
    trials = 2 + int(math.log(k))
    return torch.rand(k, trials, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kmeans_plus_plus(points: Tensor, k: int, seed: int) -> Tensor:
    """First centres, drawn among the points: each with probability ∝ its squared distance to the nearest one so far.

    Greedy: t points are drawn each time, and the one that lowers J most is kept. points: (N, d) → (k, d) float64. Where
    fewer than k points differ, all of them are drawn, and then repeats.
    """
    points = points.double()
    distance, weight = points.new_full(points.shape[:1], torch.inf), points.new_ones(points.shape[:1])
    centres = []
    for draw in _draws(k, seed).to(points.device):
        mass = weight.cumsum(0)
        drawn = points[torch.searchsorted(mass, draw * mass[-1], right=True).clamp(max=len(points) - 1)]
        remaining = torch.minimum(_distances(drawn, points).square_(), distance)
        best = remaining.sum(-1).argmin()
        centres.append(drawn[best])
        distance = weight = remaining[best]
    return torch.stack(centres)


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest centre and its index, the first one at a tie: (N,) float64, (N,) int64.

    points: (N, d), centres: (k, d). A slice of the N × k table is made at a time.
    """
    centres = centres.double()
    parts = points.split(max(1, TABLE // len(centres)))
    found = [_distances(part.double(), centres).min(-1) for part in parts]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """From the differences, not from ‖a‖² − 2⟨a, b⟩ + ‖b‖², which cancels: it is 0 exactly where a = b."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def lloyd(points: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """At most `iterations` of k-means from the given centres. points: (N, d), centres: (k, d) → (k, d) float64."""
    points, centres = points.double(), centres.double()
    for _ in range(iterations):
        distance, code = nearest(points, centres)
        count = torch.bincount(code, minlength=len(centres)).unsqueeze(-1)
        total = torch.zeros_like(centres).index_add_(0, code, points)
        updated = torch.where(count > 0, total / count.clamp(min=1), centres)
        empty = (count.squeeze(-1) == 0).nonzero().squeeze(-1)
        if len(empty):
            farthest = distance.sort(descending=True, stable=True).indices[: len(empty)]
            updated[empty[: len(farthest)]] = points[farthest]
        if torch.equal(updated, centres):
            break
        centres = updated
    return centres


def sort_numbers(x: Tensor) -> Tensor:
    """x sorted along its last axis. numpy's sort is several times faster than torch's, and makes no indices."""
    return torch.from_numpy(np.sort(x.contiguous().numpy(), axis=-1)) if x.device.type == "cpu" else x.sort(-1).values


class SortedNumbers:
    """B sorted lists of n numbers with their prefix sums: k-means without looking at every number again.

    ascending: (B, n) float32, finite, n ≥ 1, from `sort_numbers`. Centres are (B, k) float64, ascending.
    """

    def __init__(self, ascending: Tensor):
        self.ascending, self.n = ascending, ascending.shape[-1]
        exact = ascending.double()
        self.sums, self.squares = exact.new_zeros(2, len(exact), self.n + 1)
        torch.cumsum(exact, -1, out=self.sums[:, 1:])
        torch.cumsum(exact.square_(), -1, out=self.squares[:, 1:])

    def edges(self, centres: Tensor) -> Tensor:
        """(B, …, k) → (B, …, k + 1): the numbers edges[i] to edges[i + 1] − 1 are nearest to centre i."""
        middles = midpoints_down(centres)
        inner = torch.searchsorted(self.ascending, middles.flatten(1), right=True).view(middles.shape)
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.n)

    def total(self, prefix: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """Sum over the numbers first … end − 1; prefix: self.sums or self.squares."""
        return prefix.gather(-1, end.flatten(1)).sub_(prefix.gather(-1, first.flatten(1))).view(end.shape)

    def error(self, first: Tensor, end: Tensor, centre: Tensor) -> Tensor:
        """Σ (x − centre)² over the numbers first … end − 1, all (B, …)."""
        squares, sums = self.total(self.squares, first, end), self.total(self.sums, first, end)
        return (squares - 2 * centre * sums + centre.square() * (end - first)).clamp_(min=0)

    def kmeans_plus_plus(self, k: int, seed: int) -> Tensor:
        """The first centres that `kmeans_plus_plus` draws from these numbers: (B, k). All of them where n ≤ k, and repeats."""
        if k >= self.n:
            return torch.nn.functional.pad(self.ascending.double(), (0, k - self.n), mode="replicate")
        draws = _draws(k, seed).to(self.ascending.device)
        drawn = self.ascending[:, (draws[0] * self.n).long()]
        centres = drawn.new_empty(len(drawn), 0, dtype=torch.float64)
        for draw in draws:
            if centres.shape[-1]:
                drawn = self._draw(centres, draw)
            trial = torch.cat([centres.unsqueeze(1).expand(-1, len(draw), -1), drawn.double().unsqueeze(-1)], -1)
            trial = trial.sort(-1).values
            edges = self.edges(trial)
            best = self.error(edges[..., :-1], edges[..., 1:], trial).sum(-1).argmin(-1)
            centres = trial[torch.arange(len(trial), device=trial.device), best]
        return centres

    def _draw(self, centres: Tensor, draw: Tensor) -> Tensor:
        """(B, t) numbers, each with probability ∝ its squared distance to the nearest centre; draw: (t,) in [0, 1).

        The errors of the stretches tell in which one a draw falls, bisection tells where in it.
        """
        edges = self.edges(centres)
        mass = self.error(edges[:, :-1], edges[:, 1:], centres).cumsum(-1)
        target = draw * mass[:, -1:]
        stretch = torch.searchsorted(mass, target, right=True).clamp_(max=centres.shape[-1] - 1)
        target = target - torch.nn.functional.pad(mass, (1, 0)).gather(-1, stretch)
        start, centre = edges.gather(-1, stretch), centres.gather(-1, stretch)
        low, high = start, edges.gather(-1, stretch + 1) - 1
        for _ in range(self.n.bit_length()):
            middle = (low + high) // 2
            reached = self.error(start, middle + 1, centre) > target
            low, high = torch.where(reached, low, middle + 1).minimum(high), torch.where(reached, middle, high)
        return self.ascending.gather(-1, low)

    def lloyd(self, centres: Tensor, iterations: int) -> Tensor:
        """At most `iterations` of k-means from the given centres: (B, k) → (B, k)."""
        for _ in range(iterations):
            edges = self.edges(centres)
            first, end = edges[:, :-1], edges[:, 1:]
            count = end - first
            lowest = self.ascending.gather(-1, first.clamp(max=self.n - 1)).double()
            highest = self.ascending.gather(-1, (end - 1).clamp(min=0)).double()
            mean = self.total(self.sums, first, end) / count.clamp(min=1)
            mean = mean.clamp(lowest, highest)  # prefix sums round: equal numbers must have themselves as mean
            updated = torch.where(count > 0, mean, centres)
            if (count == 0).any():
                updated = _fill_empty(updated, count == 0, lowest, highest)
            updated = updated.sort(-1).values
            if torch.equal(updated, centres):
                break
            centres = updated
        return centres


def _fill_empty(centres: Tensor, empty: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Move empty centres to the numbers farthest from their own: the ends of a stretch are its farthest. All (B, k)."""
    ends = torch.cat([lowest, highest], -1)
    distance = (ends - torch.cat([centres, centres], -1)).abs().masked_fill(torch.cat([empty, empty], -1), 0)
    order = distance.sort(dim=-1, descending=True, stable=True).indices
    place = (empty.cumsum(-1) - 1).clamp(min=0)  # the i-th empty centre takes the i-th farthest
    return torch.where(empty, ends.gather(-1, order.gather(-1, place)), centres)


def midpoints_down(centres: Tensor) -> Tensor:
    """(…, k) float64, sorted → (…, k − 1) float32, rounded down: x ≤ it exactly where x ≤ the midpoint, for a float32 x."""
    exact = centres[..., :-1] + (centres[..., 1:] - centres[..., :-1]) / 2
    rounded = exact.float()
    return torch.where(rounded.double() > exact, rounded.nextafter(rounded.new_tensor(-torch.inf)), rounded)
