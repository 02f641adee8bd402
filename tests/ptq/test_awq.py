"""AWQ: by hand, and against the same search written out over all inputs in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.calibrate import InputStats, output_error
from qlab.formats import MXFP4, NF4, NVFP4, Q4_0, Q4_1, Binary, FloatCast, IntAffine, KMeans, ProductQuantizer, Ternary
from qlab.ptq.awq import AWQ, candidate, search_clip, search_scale
from qlab.ptq.method import RTN, Method

GROUPS = [
    IntAffine(3, granularity="group", group_size=16),
    IntAffine(2, symmetric=False, granularity="group", group_size=16, param_dtype=torch.float16),
    IntAffine(4, granularity="channel", narrow=False),
    IntAffine(3, symmetric=False, granularity="channel", float_zero_point=True),
    NF4(16),
    NF4(16, double_quant=True),
    Q4_0(),
    Q4_1(),
    MXFP4(),
    Ternary(granularity="group", group_size=32),
    Binary(granularity="channel"),
    KMeans(2, granularity="channel"),
]


def data(seed=0, shapes=((24, 64), (8, 64)), tokens=400, outliers=3, dtype=torch.float32):
    """(weights, x (tokens, in), its statistics): a few channels of x are far larger than the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shapes[0][1], generator=g, dtype=torch.float64) @ torch.diag(
        torch.rand(shapes[0][1], generator=g, dtype=torch.float64) + 0.1
    )
    x[:, :outliers] *= 30
    x[:, 5] += 0.5 * x[:, 0]
    x = x.to(dtype)
    stats = InputStats(("mean_abs", "hessian"), torch.float64)
    stats.observe(x)
    return [torch.randn(*shape, generator=g).to(dtype) * 0.05 for shape in shapes], x, stats


def true_error(w_hat, w, x):
    """‖W'x − Wx‖² over a token, in float64."""
    return float(((w_hat.double() - w.double()) @ x.double().T).square().sum() / len(x))


def rounded(fmt, w, scale):
    return fmt.quantize(w * scale).dequantize() / scale


def by_hand():
    """Two channels, 2 bits (codes −1, 0, 1): x₂ = ±100 and a weight of 0.4 beside x₁ = ±1 and a weight of 1."""
    x = torch.tensor([[1.0, 100.0], [-1.0, 100.0], [1.0, -100.0], [-1.0, -100.0]])
    stats = InputStats(("mean_abs", "hessian"))
    stats.observe(x)
    return torch.tensor([[1.0, 0.4]]), stats


def test_scale_by_hand():
    assert candidate(torch.tensor([16.0, 4.0, 1.0]), 0.5).tolist() == [2, 1, 0.5]
    assert candidate(torch.tensor([16.0, 4.0, 1.0]), 0).tolist() == [1, 1, 1]
    w, stats = by_hand()
    search = search_scale([w], stats.mean_abs, stats.hessian, IntAffine(2))
    assert search.ratios.tolist() == pytest.approx([i / 20 for i in range(20)])
    assert search.errors[0] == pytest.approx((0.4 * 100) ** 2)  # nearest: 0.4 becomes 0
    # s = (0.01^α, 1) / 0.1^α. At α = 0.2 both scaled weights are near 0.632: both get code 1.
    s = 10**-0.2, 10**0.2
    assert search.errors[4] == pytest.approx((0.4 * s[1] / s[0] - 1) ** 2, rel=1e-3)
    assert search.ratio == 0.2 and search.scale.tolist() == pytest.approx(s)


def test_clip_by_hand():
    """Share .95 of 1: codes ±7 of a step .95/7. All inputs apart, so the error is Σ d²·x²."""
    w = torch.tensor([[1.0, 0.95 / 7 * 3, 0.95 / 7 * 2, -0.95 / 7]])
    hessian = 2 * torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]))  # clipping the first weight costs nothing
    params = search_clip(w, hessian, IntAffine(4))
    assert params["scale"].tolist() == pytest.approx([0.95 / 7])
    costly = search_clip(w, hessian + 2 * torch.diag(torch.tensor([1e4, 0, 0, 0])), IntAffine(4))
    assert costly["scale"].tolist() == pytest.approx([1 / 7])
    # A row of two groups: only the second input sees anything, so only its group is clipped.
    fmt = IntAffine(4, granularity="group", group_size=4)
    pair = search_clip(torch.cat([w, w], 1), torch.block_diag(torch.eye(4) * 0, hessian), fmt)
    assert pair["scale"].tolist() == [pytest.approx([1 / 7, 0.95 / 7])]


@pytest.mark.parametrize(
    "fmt", [*GROUPS, IntAffine(4, granularity="tensor"), NVFP4(), ProductQuantizer(4, 3)], ids=repr
)
def test_scale_against_all_inputs(fmt):
    weights, x, stats = data()
    search = search_scale(weights, stats.mean_abs, stats.hessian, fmt, steps=8)
    mean_abs = x.double().abs().mean(0)
    for i in range(8):
        formula = mean_abs ** (i / 8)
        formula = formula / (formula.max() * formula.min()).sqrt()
        scale = candidate(stats.mean_abs, i / 8)
        torch.testing.assert_close(scale.double(), formula, rtol=1e-5, atol=0)
        expected = sum(true_error(rounded(fmt, w, scale), w, x) for w in weights)
        assert float(search.errors[i]) == pytest.approx(expected, rel=1e-5), i
    assert search.ratio == float(search.errors.argmin()) / 8
    chosen = sum(true_error(rounded(fmt, w, search.scale), w, x) for w in weights)
    nearest = sum(true_error(fmt.quantize(w).dequantize(), w, x) for w in weights)
    assert chosen == pytest.approx(float(search.errors.min()), rel=1e-4)
    assert chosen <= nearest * (1 + 1e-6)


@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_against_all_inputs(group_size, symmetric):
    """Block by block, share by share, in plain loops over X."""
    (w, _), x, stats = data(seed=1)
    fmt = IntAffine(3, symmetric, granularity="group", group_size=group_size)
    scale = search_clip(w, stats.hessian, fmt)["scale"]
    single, clipped = IntAffine(3, symmetric, granularity="tensor"), 0
    for row in range(w.shape[0]):
        for n, start in enumerate(range(0, w.shape[1], group_size)):
            block, inputs = w[row, start : start + group_size], x[:, start : start + group_size].double()
            found = []
            for i in range(10):
                limit = float(block.abs().max()) * (1 - 0.05 * i)
                params = single.fit(block.clamp(-limit, limit))
                d = single.decode(single.encode(block, params), params).double() - block.double()
                found.append((float((inputs @ d).square().mean()), i, float(params["scale"])))
            best, share, expected = min(found)
            assert float(scale[row, n]) == pytest.approx(expected, rel=1e-5), (row, n, found)
            clipped += share > 0
    assert clipped > scale.numel() / 2  # or nothing was tried


@pytest.mark.parametrize("fmt", GROUPS, ids=repr)
def test_never_worse_than_nearest_and_no_bit_more(fmt):
    (w, other), x, stats = data(seed=2)
    method, before = AWQ(), w.clone()
    scale = method.scale([w, other], stats, [fmt, fmt])
    scale = torch.ones(64) if scale is None else scale
    q, g_idx = method.quantize(w * scale, fmt, stats.divided_by(scale), "layers.0.mlp.up_proj")
    nearest = fmt.quantize(w * scale)
    assert g_idx is None and q.bits_per_weight == nearest.bits_per_weight == fmt.quantize(w).bits_per_weight
    assert q.packed.shape == nearest.packed.shape and {k: p.dtype for k, p in q.params.items()} == {
        k: p.dtype for k, p in nearest.params.items()
    }
    assert torch.equal(w, before)
    # block by block no worse than without clipping
    size = min(fmt.blocks(w).shape[-1], 64)
    xs = (x / scale).double().unflatten(1, (-1, size))
    if "double_quant" not in repr(fmt) and not isinstance(fmt, Q4_0 | Q4_1):  # rounding the params comes after
        after, plain = (
            torch.einsum("tng,ong->ton", xs, (v.dequantize() - w * scale).double().unflatten(1, (-1, size)))
            .square()
            .mean(0)
            for v in (q, nearest)
        )
        assert (after <= plain * (1 + 1e-4) + 1e-12).all()


def test_each_layer_has_its_own_format():
    weights, _, stats = data()
    two, four = IntAffine(2), IntAffine(4)
    mixed = search_scale(weights, stats.mean_abs, stats.hessian, [two, four])
    parts = [search_scale([w], stats.mean_abs, stats.hessian, f) for w, f in zip(weights, (two, four), strict=True)]
    torch.testing.assert_close(mixed.errors, parts[0].errors + parts[1].errors)
    assert torch.equal(AWQ().scale(weights, stats, [two, four]), mixed.scale)


def test_outlier_channels_are_what_it_is_for():
    weights, x, stats = data(seed=3)
    fmt = IntAffine(3, granularity="group", group_size=32)
    search = search_scale(weights, stats.mean_abs, stats.hessian, fmt)
    assert search.errors.min() < 0.35 * search.errors[0] and 0.2 <= search.ratio <= 0.9
    assert search.scale[:3].min() > search.scale[3:].max()


@given(st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]), st.integers(0, 63))
def test_hostile_inputs(seed, unit, dead):
    (w, _), x, _ = data(seed, tokens=20)
    x, w = x * unit, w.clone()
    x[:, dead] = 0
    w[:, 7], w[0], w[1] = 3.0, 0, 0.25
    stats = InputStats(("mean_abs", "hessian"), torch.float64)
    stats.observe(x)
    fmt, method = IntAffine(3, granularity="group", group_size=16), AWQ()
    search = search_scale([w], stats.mean_abs, stats.hessian, fmt)
    assert search.scale.isfinite().all() and (search.scale > 0).all()
    assert search.errors.isfinite().all() and search.errors.min() <= search.errors[0]
    scale = method.scale([w], stats, [fmt])
    scale = torch.ones(64) if scale is None else scale
    w_hat = method.quantize(w * scale, fmt, stats.divided_by(scale), "x")[0].dequantize() / scale
    assert w_hat.isfinite().all() and not w_hat[0].any()
    plain = search_scale([w], stats.mean_abs / unit, stats.hessian / unit**2, fmt)
    assert plain.ratio == search.ratio  # the unit of x is nobody's business


def test_inputs_that_are_all_zero_or_all_alike():
    (w, _), x, _ = data()
    for x in (torch.zeros(4, 64), torch.ones(4, 64)):
        stats = InputStats(("mean_abs", "hessian"))
        stats.observe(x)
        assert AWQ().scale([w], stats, [GROUPS[0]]) is None
        q, _ = AWQ().quantize(w, GROUPS[0], stats, "x")
        assert q.dequantize().isfinite().all()
    stats = InputStats(("mean_abs", "hessian"))
    stats.observe(torch.zeros(4, 64))
    assert torch.equal(AWQ().quantize(w, GROUPS[0], stats, "x")[0].packed, GROUPS[0].quantize(w).packed)


def test_double_weights_stay_double():
    (w, _), _, stats = data(dtype=torch.float64)
    scale = AWQ().scale([w], stats, [GROUPS[0]])
    assert scale.dtype == torch.float32  # as the layer keeps it, so that x / s and W · s meet exactly
    assert AWQ().quantize(w * scale, GROUPS[0], stats, "x")[0].dequantize().dtype == torch.float64


def test_queries_and_keys_are_not_clipped():
    (w, _), _, stats = data()
    nearest = GROUPS[0].quantize(w)
    for name, clipped in {
        "encoder.layer.0.attention.self.query": False, "model.layers.1.self_attn.q_proj": False, "k_proj": False,
        "h.0.attn.c_attn": False, "attn.Wqkv": False, "attention.self.value": True, "model.layers.1.self_attn.v_proj": True,
        "seq_k_encoder.layer.0.output.dense": True, "query.out": True,
    }.items():  # fmt: skip
        q, _ = AWQ().quantize(w, GROUPS[0], stats, name)
        assert torch.equal(q.params["scale"], nearest.params["scale"]) == (not clipped), name
    assert torch.equal(AWQ(clip=False).quantize(w, GROUPS[0], stats, "v")[0].packed, nearest.packed)
    assert torch.equal(AWQ(no_clip=("v",)).quantize(w, GROUPS[0], stats, "a.v")[0].packed, nearest.packed)


def test_codes_by_another_method():
    class Noted(Method):
        keep = ("hessian", "second_moment")
        calls = []

        def quantize(self, w, fmt, stats, name):
            self.calls.append((w, fmt, stats, name))
            return fmt.quantize(w), torch.zeros(64, dtype=torch.int32)

    (w, _), _, stats = data()
    method = AWQ(codes=Noted())
    assert method.keep == ("mean_abs", "hessian", "second_moment") and AWQ().keep == ("mean_abs", "hessian")
    assert torch.equal(method.scale([w], stats, [GROUPS[0]]), AWQ().scale([w], stats, [GROUPS[0]]))
    q, g_idx = method.quantize(w, GROUPS[0], stats, "x")
    assert Noted.calls == [(w, GROUPS[0], stats, "x")] and len(g_idx) == 64
    assert torch.equal(q.packed, GROUPS[0].quantize(w).packed)
    method.check(IntAffine(4, granularity="tensor"))  # nothing is clipped: nothing to refuse


@pytest.mark.parametrize(
    "fmt",
    [
        IntAffine(4, granularity="tensor"),
        IntAffine(4, granularity="head", heads=4),
        IntAffine(4, granularity="head", heads=4, head_axis=1),
        NVFP4(),
        NF4(48),  # runs on over the end of a row
        ProductQuantizer(4, 3),
        FloatCast("bf16"),
    ],
    ids=repr,
)
def test_blocks_that_are_no_pieces_of_rows_are_refused(fmt):
    (w, _), _, stats = data()
    with pytest.raises(ValueError, match=r"AWQ chooses.*clip=False"):
        search_clip(w, stats.hessian, fmt)
    if not isinstance(fmt, NF4):  # its block of 48 divides some rows
        with pytest.raises(ValueError, match=r"AWQ.*clip=False"):
            AWQ().check(fmt)
    AWQ(clip=False).check(fmt)
    AWQ(codes=RTN(), clip=False).quantize(w, fmt, stats, "x")


def test_errors_name_the_shapes():
    (w, other), _, stats = data()
    fmt = GROUPS[0]
    with pytest.raises(ValueError, match=r"\(24, 32\) and \(64, 64\)"):
        search_scale([other, w[:, :32]], stats.mean_abs, stats.hessian, fmt)
    with pytest.raises(ValueError, match=r"\(64,\) and \(64, 64\)"):
        search_clip(w[0], stats.hessian, fmt)
    with pytest.raises(ValueError, match=r"\(32,\) beside a Hessian of \(64, 64\)"):
        search_scale([w], stats.mean_abs[:32], stats.hessian, fmt)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        search_scale([w], stats.mean_abs, stats.hessian, fmt, steps=0)
    with pytest.raises(ValueError, match="steps=0"):
        search_clip(w, stats.hessian, fmt, steps=0)
    with pytest.raises(ValueError, match="shrink=0"):
        search_clip(w, stats.hessian, fmt, shrink=0)
    with pytest.raises(ValueError, match="got no weights"):
        search_scale([], stats.mean_abs, stats.hessian, fmt)
    assert output_error(torch.zeros(2, 64), stats.hessian).tolist() == [0, 0]
