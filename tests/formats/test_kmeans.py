"""k-means itself: by hand, its objective never rises, empty centres are filled, and the two forms of Lloyd agree."""

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qlab.formats.kmeans import SortedNumbers, kmeans_plus_plus, lloyd, midpoints_down, nearest, sort_numbers


def objective(points, centres):
    """Σ ‖x − nearest centre‖², all n × k distances written out. points (N, d), centres (k, d), float64."""
    return float((points.double()[:, None] - centres[None]).square().sum(-1).amin(1).sum())


@st.composite
def points(draw, d):
    """(N, d) float32: clustered, with repeats, or with an outlier; now and then fewer different points than centres."""
    n, seed = draw(st.integers(1, 60)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * 10.0 ** draw(st.integers(-15, 4))
    kind = draw(st.sampled_from(["normal", "repeats", "outlier", "clusters"]))
    if kind == "repeats":
        x = x[torch.randint(0, draw(st.integers(1, 6)), (n,), generator=generator) % n]
    elif kind == "outlier":
        x[0] *= 1e4
    elif kind == "clusters":
        x += x[:1] * torch.randint(-3, 4, (n, 1), generator=generator) * 100
    return x


# --- by hand


def test_one_iteration_by_hand():
    x = torch.tensor([0.0, 1.0, 4.0, 10.0])
    start = torch.tensor([0.0, 6.0], dtype=torch.float64)  # the midpoint 3 parts {0, 1} from {4, 10}
    assert SortedNumbers(x[None]).lloyd(start[None], 1).tolist() == [[0.5, 7.0]]
    assert lloyd(x[:, None], start[:, None], 1).tolist() == [[0.5], [7.0]]
    # then the midpoint 3.75 changes nothing
    assert SortedNumbers(x[None]).lloyd(start[None], 9).tolist() == [[0.5, 7.0]]


def test_a_number_at_the_midpoint_goes_to_the_lower_centre():
    x, start = torch.tensor([0.0, 3.0, 6.0]), torch.tensor([0.0, 6.0], dtype=torch.float64)
    assert SortedNumbers(x[None]).lloyd(start[None], 1).tolist() == [[1.5, 6.0]]
    assert lloyd(x[:, None], start[:, None], 1).tolist() == [[1.5], [6.0]]


def test_an_empty_centre_moves_to_the_farthest_point():
    x = torch.tensor([-1.0, 1.0, 90.0, 101.0])
    start = torch.tensor([0.0, 40.0, 100.0], dtype=torch.float64)
    # {−1, 1} → 0, {90, 101} → 95.5; 90 and 101 are both 5.5 off: the lower one takes the empty centre
    assert SortedNumbers(x[None]).lloyd(start[None], 1).tolist() == [[0.0, 90.0, 95.5]]
    assert SortedNumbers(x[None]).lloyd(start[None], 9).tolist() == [[0.0, 90.0, 101.0]]
    # vectors measure from the centre before it moved: 90 is 10 off
    assert lloyd(x[:, None], start[:, None], 1).tolist() == [[0.0], [90.0], [95.5]]


def test_two_empty_centres_move_to_two_points():
    x = torch.tensor([0.0, 0.0, 8.0, 20.0])
    start = torch.tensor([0.0, 1000.0, 2000.0], dtype=torch.float64)
    assert SortedNumbers(x[None]).lloyd(start[None], 1).tolist() == [[0.0, 7.0, 20.0]]
    assert lloyd(x[:, None], start[:, None], 1).tolist() == [[7.0], [20.0], [8.0]]


# --- invariants


@settings(max_examples=60)
@given(points(d=1), st.integers(1, 9), st.integers(0, 99))
def test_the_objective_of_numbers_never_rises(x, k, seed):
    numbers = SortedNumbers(sort_numbers(x.T))
    centres = torch.randn(1, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(-1).values
    centres *= float(x.abs().max())  # not data points: some are empty at the start
    before = objective(x, centres.T)
    for _ in range(12):
        centres = numbers.lloyd(centres, 1)
        after = objective(x, centres.T)
        assert after <= before * (1 + 1e-9)
        before = after


@settings(max_examples=60)
@given(points(d=3), st.integers(1, 9), st.integers(0, 99))
def test_the_objective_of_vectors_never_rises(x, k, seed):
    centres = torch.randn(k, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centres *= float(x.abs().max())
    before = objective(x, centres)
    for _ in range(12):
        centres = lloyd(x, centres, 1)
        after = objective(x, centres)
        assert after <= before * (1 + 1e-9)
        before = after


@settings(max_examples=60)
@given(points(d=1), st.integers(1, 9), st.integers(0, 99))
def test_both_forms_agree_on_numbers(x, k, seed):
    """From first centres among the points none is empty; then each iteration is the same arithmetic."""
    start = kmeans_plus_plus(x, k, seed).unique().unsqueeze(1)
    for iterations in (1, 2, 30):
        vectors = lloyd(x, start, iterations)
        numbers = SortedNumbers(sort_numbers(x.T)).lloyd(start.T.contiguous(), iterations)
        # where a centre is empty the two measure the farthest point differently, after and before the move
        assume(torch.bincount(nearest(x, vectors)[1], minlength=len(start)).min() > 0)
        torch.testing.assert_close(numbers[0], vectors.squeeze(1).sort().values, rtol=1e-9, atol=0)


@settings(max_examples=60)
@given(points(d=2), st.integers(1, 9), st.integers(0, 99))
@example(torch.tensor([[1.0, 0.0], [1.0, 1e-9], [1.0, 2e-9]]), 3, 0)
def test_first_centres_are_different_points(x, k, seed):
    """As many different ones as there are; so few different points are all drawn."""
    first = kmeans_plus_plus(x, k, seed)
    assert (first[:, None] == x.double()).all(-1).any(1).all(), "each is a point"
    assert len(first.unique(dim=0)) == min(k, len(x.unique(dim=0)))
    if k >= len(x.unique(dim=0)):
        assert objective(x, lloyd(x, first, 1)) == 0


@settings(max_examples=60)
@given(points(d=1), st.integers(1, 9))
def test_few_different_numbers_are_found_from_any_start(x, k):
    """All centres at one place: one has points, the empty ones take what is farthest, until each number has one."""
    different = len(x.unique())
    start = torch.zeros(1, max(k, different), dtype=torch.float64)
    centres = SortedNumbers(sort_numbers(x.T)).lloyd(start, 300)
    assert objective(x, centres.T) == 0


def test_first_centres_favour_far_points():
    """100 points at 0, one at 1, one at 10: next to 0, the two weigh 1 and 100, and 10 lowers the error more."""
    x = torch.cat([torch.zeros(100), torch.tensor([1.0, 10.0])])
    for seed in range(100):
        assert sorted(kmeans_plus_plus(x[:, None], 2, seed).flatten().tolist()) == [0.0, 10.0]


def test_draws_follow_the_squared_distance():
    """From centre 0, the numbers 1, 2 and 3 weigh 1, 4 and 9 of 14; the repeated 0 nothing."""
    numbers = SortedNumbers(torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]]))
    drawn = numbers._draw(torch.zeros(1, 1, dtype=torch.float64), torch.arange(1400, dtype=torch.float64) / 1400)
    assert torch.bincount(drawn[0].int()).tolist() == [0, 100, 400, 900]
    between = torch.tensor([[0.0, 3.0]], dtype=torch.float64)  # now 1 and 2 weigh 1 each
    drawn = numbers._draw(between, torch.arange(1400, dtype=torch.float64) / 1400)
    assert torch.bincount(drawn[0].int()).tolist() == [0, 700, 700]


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 20))
def test_both_forms_draw_the_same_first_centres(seed, n, k):
    x = sort_numbers(torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 30 - 15))
    drawn = SortedNumbers(x).kmeans_plus_plus(k, seed)
    for row, ours in zip(x, drawn, strict=True):
        theirs = kmeans_plus_plus(row[:, None], k, seed).flatten().sort().values
        if k <= n // 2:  # with nearly all numbers taken, what remains is down to rounding
            assert torch.equal(ours, theirs)


def test_sorted_numbers_lie_in_rows():
    """A transposed weight too: bisection in columns would copy them each time."""
    x = torch.randn(4, 6).t()
    assert sort_numbers(x).is_contiguous() and torch.equal(sort_numbers(x), x.sort(-1).values)


def test_nearest_in_slices():
    x, centres = torch.randn(5000, 2), torch.randn(100, 2)
    distance, code = nearest(x, centres)
    every = (x.double()[:, None] - centres.double()).square().sum(-1)
    assert torch.equal(code, every.argmin(1))
    torch.testing.assert_close(distance, every.amin(1).sqrt())


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.floats(-(2.0**127), 2.0**127, width=32))
@example(1.0, 1.0000001192092896)
def test_midpoints_are_rounded_down(a, b):
    """Adjacent float32 numbers have no float32 between them: rounding to the even one would swallow the upper."""
    a, b = sorted((a, b))
    centres = torch.tensor([a, b], dtype=torch.float64)
    middle = midpoints_down(centres)
    assert middle.dtype == torch.float32 and float(middle) <= (a + b) / 2 < float(
        middle.nextafter(torch.tensor(torch.inf))
    )
    if a < b:
        assert a <= float(middle) < b
