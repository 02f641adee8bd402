"""GPTQ: against column-by-column elimination of H⁻¹ in float64, by hand and by brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from qlab.calibrate import output_error
from qlab.formats import FP4, MXFP4, NF4, NVFP4, Q4_0, Q4_1, Q8_0, Binary, IntAffine, KMeans, Ternary
from qlab.nn import QuantLinear
from qlab.ptq.gptq import GPTQ, _lazy_batches, gptq, inverse_cholesky

OUT, IN = 6, 96


def grouped(bits=3, group_size=16, symmetric=False, **settings):
    return IntAffine(bits, symmetric, "group", group_size, **settings)


EVERY_FORMAT = [
    IntAffine(4, granularity="tensor"),
    IntAffine(3, granularity="channel", narrow=False),
    IntAffine(3, symmetric=False, granularity="head", heads=3, head_axis=0),
    IntAffine(3, symmetric=False, granularity="head", heads=4, head_axis=1),
    grouped(),
    grouped(float_zero_point=True, param_dtype=torch.bfloat16),
    Binary(),
    Binary("group", 8),
    Ternary("twn", "channel"),
    Ternary("twn", "group", 24),
    Ternary("bitnet"),
    KMeans(2, "channel"),
    KMeans(2, "group", 32),
    NF4(32),
    NF4(16, double_quant=True),
    FP4(96),
    Q4_0(),
    Q4_1(),
    Q8_0(),
    MXFP4(),
    NVFP4(),
]
every_format = pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=repr)


def weight(out=OUT, columns=IN, seed=0, dtype=torch.float64):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.05


def hessian_of(columns=IN, seed=1, dtype=torch.float64):
    """Of correlated inputs, some channels much larger than others, in no order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = x * torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    return (2 / len(x) * x.T @ x).to(dtype)


def dequantized(q, g_idx):
    """The weights with their columns in the order of the inputs."""
    return QuantLinear(q, g_idx=g_idx).dequantized_weight(torch.float64)


def error_of(w_hat, w, hessian):
    return float(output_error(w_hat.double() - w.double(), hessian.double()).sum())


# --- a reference without Cholesky, without blocks, and without qlab's formats


def symmetric_levels(bits):
    top = 2 ** (bits - 1) - 1
    return lambda w: w.abs().amax(1, keepdim=True) / top * torch.arange(-top, top + 1)


def asymmetric_levels(bits):
    def levels(w):
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        return scale * (torch.arange(2**bits) - (-low / scale).round())

    return levels


def nf4_levels(w):
    return w.abs().amax(1, keepdim=True) * NF4.values.double()


def binary_levels(w):
    return w.abs().mean(1, keepdim=True) * torch.tensor([-1.0, 1.0])


def reference(w, hessian, levels, group, damping=0.01, act_order=False, static=False, stored=lambda table: table):
    """Eqs. (2) and (3): round a column, move those after it by its row of H⁻¹, eliminate it from H⁻¹.

    levels(weights of a group) → (out, k); stored(levels) → what they are when they are read back. Returns the number of
    the level and its value for each weight, (out, in) both.
    """
    w, original = w.clone(), w.clone()
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)))
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    number, value = torch.zeros(w.shape, dtype=torch.long), torch.zeros_like(w)
    for place, j in enumerate(order.tolist()):
        if static:
            start = j // group * group
            table = levels(original[:, start : start + group])
        elif place % group == 0:
            table = levels(w[:, order[place : place + group]])
        nearest = (w[:, j, None] - table).abs().argmin(1)
        number[:, j], value[:, j] = nearest, stored(table).gather(1, nearest[:, None])[:, 0]
        later = order[place + 1 :]
        w[:, later] -= (w[:, j] - value[:, j])[:, None] / inverse[j, j] * inverse[j, later]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return number, value


CASES = {
    "channel": (IntAffine(3, granularity="channel"), symmetric_levels(3), IN),
    "channel, asymmetric": (IntAffine(4, symmetric=False), asymmetric_levels(4), IN),
    "group 16": (grouped(3, 16), asymmetric_levels(3), 16),
    "group 24": (grouped(4, 24, symmetric=True), symmetric_levels(4), 24),
    "group 48, 2 bits": (grouped(2, 48), asymmetric_levels(2), 48),
    "group 3": (grouped(2, 3, symmetric=True), symmetric_levels(2), 3),
    "NF4": (NF4(32), nf4_levels, 32),
    "binary": (Binary("group", 32), binary_levels, 32),
}


@pytest.mark.parametrize("act_order, static", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", CASES)
def test_equals_elimination_in_float64(name, act_order, static):
    """Blocks smaller and larger than a group, dividing it or not: always the same codes."""
    fmt, levels, group = CASES[name]
    w, hessian = weight(), hessian_of()
    from_w = static or group == IN
    number, value = reference(w, hessian, levels, group, act_order=act_order, static=from_w)
    for block_size in (1, 7, 20, 64, 128):
        q, g_idx = gptq(w, hessian, fmt, act_order=act_order, static_groups=static, block_size=block_size)
        assert (g_idx is None) == (not act_order or from_w)
        torch.testing.assert_close(dequantized(q, g_idx), value, rtol=1e-5, atol=1e-9)
        codes = q.codes if g_idx is None else q.codes[:, g_idx.argsort(stable=True).argsort()]
        assert torch.equal(codes.long() - fmt.lowest_code, number)


@pytest.mark.parametrize("static", [False, True])
def test_the_rounding_of_stored_params_is_made_up_for(static):
    """Q4_0 on weights so small that float16 holds d to a few percent: codes are chosen with d, errors are those of the file."""
    steps = torch.arange(-8.0, 8.0, dtype=torch.float64)

    def levels(w):
        return w.gather(1, w.abs().argmax(1, keepdim=True)) / -8 * steps

    def stored(table):
        return table[:, 9:10].half().double() * steps

    w, hessian = weight() * 1e-4, hessian_of()
    number, value = reference(w, hessian, levels, 32, static=static, stored=stored)
    q, _ = gptq(w, hessian, Q4_0(), static_groups=static)
    assert torch.equal(q.codes.long() + 8, number) and torch.equal(q.dequantize(), value)
    assert not torch.equal(number, reference(w, hessian, levels, 32, static=static)[0])


@pytest.mark.parametrize("damping", [0, 1e-4, 1])
def test_damping_is_a_share_of_the_mean_diagonal(damping):
    w, hessian = weight(), hessian_of()
    number, _ = reference(w, hessian, symmetric_levels(3), IN, damping)
    for scaled in (hessian, hessian * 1e6, hessian * 1e-6):
        q, _ = gptq(w, scaled, IntAffine(3), damping=damping)
        assert torch.equal(q.codes.long() + 3, number)


def test_inverse_cholesky():
    hessian = hessian_of()
    factor = inverse_cholesky(hessian.clone(), 0.03)
    damped = hessian + 0.03 * hessian.diagonal().mean() * torch.eye(IN)
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))
    torch.testing.assert_close(factor, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 70))
def test_lazy_batches(n, group, block_size):
    """They cover the columns in order, and no group that begins inside a batch ends outside of it."""
    columns = n * group
    batches = list(_lazy_batches(columns, group, block_size))
    assert [first for first, _ in batches] == [0, *(end for _, end in batches[:-1])] and batches[-1][1] == columns
    for first, end in batches:
        assert 0 < end - first <= block_size
        assert end % group == 0 or first // group == (end - 1) // group


# --- by hand and by brute force


@every_format
@pytest.mark.parametrize("act_order", [False, True])
def test_without_correlations_it_rounds_to_nearest(fmt, act_order):
    """A diagonal hessian moves nothing, in whatever order."""
    w = weight(dtype=torch.float32)
    hessian = torch.diag(torch.rand(IN, generator=torch.Generator().manual_seed(2)) + 0.1)
    q, _ = gptq(w, hessian, fmt, act_order=act_order, static_groups=True)
    nearest = fmt.quantize(w)
    assert torch.equal(q.packed, nearest.packed) and q.params.keys() == nearest.params.keys()
    for name, param in nearest.params.items():
        assert torch.equal(q.params[name], param) and q.params[name].dtype == param.dtype
    if not act_order:
        q, _ = gptq(w, hessian, fmt)  # groups fitted when they are reached are then fitted to w
        assert torch.equal(q.packed, nearest.packed) and torch.equal(q.dequantize(), nearest.dequantize())


@given(st.integers(0, 2**31), st.floats(-0.99, 0.99), st.floats(0.1, 10), st.integers(2, 3))
def test_two_columns(seed, correlation, ratio, bits):
    """Of all codes for the second column, given the first, it takes the best; so it is never worse than rounding."""
    w = weight(1, 2, seed)
    hessian = torch.tensor([[1, correlation * ratio], [correlation * ratio, ratio**2]], dtype=torch.float64)
    fmt = IntAffine(bits, symmetric=False)
    q, _ = gptq(w, hessian, fmt, damping=0)
    nearest = fmt.quantize(w)
    assert q.codes[0, 0] == nearest.codes[0, 0]
    errors = []
    for second in range(2**bits):
        codes = torch.tensor([[int(q.codes[0, 0]), second]], dtype=torch.uint8)
        errors.append(error_of(fmt.decode(codes, q.params), w, hessian))
    ours = error_of(q.dequantize(), w, hessian)
    assert ours <= min(errors) * (1 + 1e-5) + 1e-15
    assert ours <= error_of(nearest.dequantize(), w, hessian) * (1 + 1e-5) + 1e-15


def test_against_every_choice_of_codes():
    """Four columns of 3 bits: all 4096 rows of codes tried. GPTQ is not the optimum, but nearer to it than rounding."""
    fmt, ours, nearest, best = IntAffine(3, symmetric=False), 0.0, 0.0, 0.0
    every = torch.tensor(list(itertools.product(range(8), repeat=4)), dtype=torch.uint8)
    for seed in range(60):
        w, hessian = weight(1, 4, seed), hessian_of(4, seed)
        q, _ = gptq(w, hessian, fmt, damping=0)
        ours += error_of(q.dequantize(), w, hessian)
        nearest += error_of(fmt.quantize(w).dequantize(), w, hessian)
        rows = fmt.per_row().decode(every, {name: param.expand(len(every)) for name, param in q.params.items()})
        best += float(output_error(rows.double() - w, hessian).min())
    print(f"best {best:.3g}, GPTQ {ours / best:.2f} ×, nearest {nearest / best:.2f} ×")
    assert best <= ours < 0.9 * nearest


def test_a_row_by_hand():
    """Scale 1, codes −1 … 1, H = [[2, 1], [1, 2]]: H⁻¹ = [[2, −1], [−1, 2]] / 3. Column 0: 0.6 → 1, its error −0.4 moves
    column 1 by −0.4 · 1/2, from 0.6 to 0.4, which rounds to 0."""
    w = torch.tensor([[0.6, 0.6, 1.0]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    fmt = IntAffine(2)
    assert fmt.quantize(w).codes.tolist() == [[1, 1, 1]]
    q, _ = gptq(w, hessian, fmt, damping=0)
    assert q.codes.tolist() == [[1, 0, 1]]


# --- what it is for


@every_format
@pytest.mark.parametrize("act_order, static", [(False, False), (True, False), (True, True)])
def test_output_error_falls_and_weight_error_rises(fmt, act_order, static):
    if isinstance(fmt, Binary) and fmt.refits and not act_order:
        pytest.skip("one bit has no room for what is moved into a group: its mean |w| grows from group to group")
    w, hessian = weight(36, seed=3), hessian_of()
    q, g_idx = gptq(w, hessian, fmt, act_order=act_order, static_groups=static)
    ours, nearest = dequantized(q, g_idx), fmt.quantize(w).dequantize()
    print(
        fmt, error_of(ours, w, hessian) / error_of(nearest, w, hessian), float((ours - w).norm() / (nearest - w).norm())
    )
    assert error_of(ours, w, hessian) < 0.8 * error_of(nearest, w, hessian)
    assert (ours - w).norm() > (nearest - w).norm()


def test_groups_are_fitted_to_the_updated_weights():
    """Where the updates have made the weights larger, a grid from the original weights clips them."""
    w, hessian = weight(32), hessian_of()
    fmt = grouped(3, 16)
    q, _ = gptq(w, hessian, fmt)
    static, _ = gptq(w, hessian, fmt, static_groups=True)
    assert torch.equal(static.params["scale"], fmt.fit(w)["scale"])
    assert torch.equal(q.params["scale"][:, 0], static.params["scale"][:, 0])  # nothing was moved yet
    assert (q.params["scale"][:, 1:] != static.params["scale"][:, 1:]).all()


def test_double_quantization_stores_the_absmax_of_the_fitted_groups():
    w, hessian = weight(), hessian_of()
    single, _ = gptq(w, hessian, NF4(16))
    double, _ = gptq(w, hessian, NF4(16, double_quant=True))
    assert torch.equal(double.packed, single.packed)
    stored = NF4(16, double_quant=True).stored(single.params)
    assert all(torch.equal(double.params[name], stored[name]) for name in stored)


def test_order_of_activations_helps_when_large_channels_come_last():
    w = weight(64)
    x = torch.randn(500, IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = (x + x.mean(1, keepdim=True) * 8) * torch.linspace(-3, 2, IN).exp()
    hessian, fmt = 2 / len(x) * x.T @ x, IntAffine(3)
    ordered, _ = gptq(w, hessian, fmt, act_order=True)
    plain, _ = gptq(w, hessian, fmt)
    assert error_of(ordered.dequantize(), w, hessian) < 0.8 * error_of(plain.dequantize(), w, hessian)


def test_groups_out_of_order_go_through_a_layer():
    w, hessian, x = weight(), hessian_of(), torch.randn(5, IN, dtype=torch.float64)
    q, g_idx = gptq(w, hessian, grouped(3, 16), act_order=True)
    assert g_idx.dtype == torch.int32 and g_idx.bincount().tolist() == [16] * 6
    order = hessian.diagonal().argsort(descending=True)
    assert g_idx[order].tolist() == [group for group in range(6) for _ in range(16)]
    _, value = reference(w, hessian, asymmetric_levels(3), 16, act_order=True)
    torch.testing.assert_close(QuantLinear(q, g_idx=g_idx)(x), linear(x, value), rtol=1e-5, atol=1e-6)


def test_one_group_needs_no_g_idx():
    q, g_idx = gptq(weight(), hessian_of(), grouped(3, IN), act_order=True)
    channel, _ = gptq(weight(), hessian_of(), IntAffine(3, symmetric=False), act_order=True)
    assert g_idx is None and torch.equal(q.codes, channel.codes)


# --- inputs of all kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_worked_on_in_float32(dtype):
    w, hessian = weight(dtype=dtype), hessian_of()
    q, _ = gptq(w, hessian, IntAffine(3))
    expected, _ = gptq(w.float(), hessian.float(), IntAffine(3))
    assert q.dtype == dtype and q.dequantize().dtype == dtype and torch.equal(q.codes, expected.codes)
    number, _ = reference(w.double(), hessian, symmetric_levels(3), IN)
    assert (q.codes + 3 == number).float().mean() > 0.99


@pytest.mark.parametrize("out, columns", [(1, 1), (1, 13), (7, 1), (5, 29), (3, 130), (13, 257)])
def test_odd_shapes(out, columns):
    w, hessian = weight(out, columns), hessian_of(columns)
    for fmt, levels in ((IntAffine(3), symmetric_levels(3)), (IntAffine(5, False), asymmetric_levels(5))):
        q, _ = gptq(w, hessian, fmt)
        _, value = reference(w, hessian, levels, columns)
        torch.testing.assert_close(q.dequantize(), value, rtol=1e-5, atol=1e-9)
    if columns == 13:
        with pytest.raises(ValueError, match="group_size=4 does not divide"):
            gptq(w, hessian, grouped(3, 4))


@every_format
def test_formats_that_can(fmt):
    GPTQ().check(fmt)
