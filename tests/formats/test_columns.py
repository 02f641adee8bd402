"""Column by column: what GPTQ asks of a format. Encoded alone, a column must get the codes that it has in the whole weight."""

import pytest
import torch

from qlab.formats import (
    FP4,
    MXFP4,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    Binary,
    FloatCast,
    IntAffine,
    KMeans,
    ProductQuantizer,
    Ternary,
)  # fmt: skip

SHAPE = torch.Size((6, 96))
FORMATS = [
    IntAffine(4), IntAffine(3, granularity="tensor"), IntAffine(4, False, "group", group_size=12),
    IntAffine(4, False, "group", group_size=32, float_zero_point=True, param_dtype=torch.float16),
    IntAffine(4, granularity="head", heads=3), IntAffine(4, False, "head", heads=3, head_axis=1),
    Binary(), Binary("group", 12), Ternary("twn"), Ternary("twn", "group", 8), Ternary("bitnet", "channel"),
    KMeans(2), KMeans(2, "channel"), KMeans(1, "group", 12),
    NF4(32), FP4(96), NF4(32, double_quant=True), Q4_0(), Q4_1(), Q8_0(), MXFP4(), NVFP4(),
]  # fmt: skip
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, SHAPE[1])


@every_format
def test_columns_alone_have_the_codes_of_the_whole(fmt):
    w = weight()
    params, rows = fmt.fit(w), fmt.per_row()
    by_row = fmt.row_params(params, SHAPE)
    (groups,) = {param.shape[1] for param in by_row.values()}
    assert all(param.shape[0] == SHAPE[0] for param in by_row.values())
    codes, decoded = fmt.encode(w, params), fmt.decode(fmt.encode(w, params), params)
    for column in range(SHAPE[1]):
        group = column * groups // SHAPE[1]
        own = {name: param[:, group] for name, param in by_row.items()}
        alone = rows.encode(w[:, column : column + 1], own)
        assert torch.equal(alone, codes[:, column : column + 1])
        assert torch.equal(rows.decode(alone, own), decoded[:, column : column + 1])


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.refits], ids=repr)
def test_a_group_can_be_fitted_alone(fmt):
    w = weight()
    params, rows = fmt.fit(w), fmt.per_row()
    by_row = fmt.row_params(params, SHAPE)
    width = SHAPE[1] // next(iter(by_row.values())).shape[1]
    w[:, :width] *= 2
    for name, param in rows.fit(w[:, :width]).items():
        by_row[name][:, 0] = param
    changed = fmt.fit(w)
    assert all(torch.equal(params[name], changed[name]) for name in changed), (
        "written through to the format's own params"
    )


def test_only_groups_with_params_of_their_own_are_fitted_again():
    shared = [NVFP4(), Q4_K(), IntAffine(4), IntAffine(4, granularity="tensor"), KMeans(2)]
    shared.append(IntAffine(4, False, "head", heads=3, head_axis=1))
    assert not any(fmt.refits for fmt in shared)


@pytest.mark.parametrize("fmt", [ProductQuantizer(4), FloatCast("bf16"), Q4_K()], ids=repr)
def test_formats_whose_columns_hang_together_say_so(fmt):
    with pytest.raises(ValueError, match="cannot be encoded column by column"):
        fmt.per_row()


def test_blocks_across_rows_are_refused():
    fmt = NF4(64)
    with pytest.raises(ValueError, match=r"\(6, 96\): blocks of 64 run over the ends of its rows"):
        fmt.row_params(fmt.fit(weight()), SHAPE)


def test_what_is_stored():
    w = weight()
    assert Ternary("twn").stored(Ternary("twn").fit(w)).keys() == {"scale"}
    assert Q4_0().fit(w)["scale"].dtype == torch.float32 and Q4_0().quantize(w).params["scale"].dtype == torch.float16
    nested = NF4(32, double_quant=True)
    assert nested.fit(w).keys() == {"absmax"}
    assert nested.quantize(w).params.keys() == {"absmax_code", "absmax_scale", "absmax_offset"}
