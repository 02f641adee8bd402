"""Notebook 05: signs and their product on bits, ternary rules, five trits to a byte and Lloyd's step, against qlab.formats."""

import itertools

import torch

from qlab.formats import Binary, Ternary, sign_words, xnor_matmul
from qlab.formats.kmeans import lloyd
from qlab.formats.ternary import pack_trits, unpack_trits


def weights():
    """Random weights of several sizes, heavy-tailed ones, a row of zeros, ties at a rounding threshold."""
    generator = torch.Generator().manual_seed(5)
    for shape in ((1, 1), (3, 7), (12, 130), (64, 384)):
        w = torch.randn(shape, generator=generator) * 0.05
        yield from (w, -w, w**3)
    yield torch.cat([torch.zeros(1, 8), torch.tensor([[0.5, -0.5, 1.0, -1.0, 1.5, 0.0, -1.5, 2.0]])])


def binarize(function):
    for w in weights():
        b, scale = function(w)
        q = Binary("channel").quantize(w)
        assert torch.equal(scale, q.params["scale"]) and torch.equal(scale[:, None] * b, q.dequantize())


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def operands():
    """(a, b, k) with lengths around whole words; zeros and equal rows among them."""
    generator = torch.Generator().manual_seed(6)
    for k in (1, 5, 63, 64, 65, 127, 128, 300):
        a, b = torch.randn(7, k, generator=generator), torch.randn(4, k, generator=generator)
        a[0, 0], b[0] = 0.0, a[1]
        yield a, b, k


def words_of(function):
    """The order of the bits in a word is free, as long as it is one order: the product shows it."""
    for a, b, k in operands():
        assert function(a).shape == sign_words(a).shape and function(a).dtype == torch.int64
        product = xnor_matmul(function(a), function(b), k)
        assert torch.equal(product, xnor_matmul(sign_words(a), sign_words(b), k))


def xnor_product(function):
    for a, b, k in operands():
        product = function(sign_words(a), sign_words(b), k)
        assert torch.equal(product.int(), xnor_matmul(sign_words(a), sign_words(b), k))
        assert torch.equal(product.float(), signs(a) @ signs(b).T)


def ternary_rule(rule):
    def oracle(function):
        for w in weights():
            codes, scale = function(w)
            q = Ternary(rule).quantize(w)
            assert torch.equal(codes, q.codes.float()) and torch.equal(scale, q.params["scale"]), (rule, w.shape)

    return oracle


def squared_error(w, w_hat):
    return float((w.double() - w_hat.double()).square().sum())


def best_ternary(function):
    """No rule of qlab is closer, and on a few weights no other choice of codes at all, each with its own best scale."""
    for w in weights():
        codes, scale = function(w)
        assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
        for rule in ("twn", "bitnet"):
            other = squared_error(w, Ternary(rule).quantize(w).dequantize())
            assert squared_error(w, scale * codes) <= other * (1 + 1e-6)
    generator = torch.Generator().manual_seed(7)
    every = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=7)), dtype=torch.float64)[1:]
    every = every[every.abs().sum(1) > 0]
    for _ in range(20):
        w = torch.randn(7, generator=generator).double() ** 3
        best = (w.square().sum() - (every @ w) ** 2 / every.square().sum(1)).min()
        codes, scale = function(w)
        assert squared_error(w, scale * codes) <= float(best) + 1e-6 * float(w.square().sum())


def trits():
    generator = torch.Generator().manual_seed(8)
    for shape in ((1,), (5,), (7, 3), (64, 101)):
        yield torch.randint(-1, 2, shape, generator=generator).to(torch.int8)


def pack5(function):
    for codes in trits():
        assert torch.equal(function(codes), pack_trits((codes + 1).to(torch.uint8)))


def unpack5(function):
    for codes in trits():
        packed = pack_trits((codes + 1).to(torch.uint8))
        assert torch.equal(function(packed, codes.numel()) + 1, unpack_trits(packed, codes.numel()).long())


def lloyd_step(function):
    after, code = function(torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.0, 9.0, 50.0]))  # one weight, and none
    assert code.tolist() == [0, 0, 1] and after.tolist() == [0.5, 10.0, 50.0]
    generator = torch.Generator().manual_seed(9)
    for n, k in ((50, 2), (400, 8), (3000, 16)):
        w = torch.randn(n, generator=generator, dtype=torch.float64) ** 3
        centres = torch.linspace(-1, 1, k, dtype=torch.float64)
        for _ in range(3):
            after, code = function(w, centres)
            assert torch.equal(code, (w[:, None] - centres).abs().argmin(1))
            if len(code.unique()) == k:  # qlab moves an empty centre, the lesson leaves it
                torch.testing.assert_close(after, lloyd(w[:, None], centres[:, None], 1)[:, 0], rtol=1e-12, atol=1e-12)
            else:
                empty = torch.bincount(code, minlength=k) == 0
                assert torch.equal(after[empty], centres[empty])
            centres = after


ORACLES = {
    "binarize": binarize,
    "words_of": words_of,
    "xnor_product": xnor_product,
    "twn": ternary_rule("twn"),
    "bitnet": ternary_rule("bitnet"),
    "best_ternary": best_ternary,
    "pack5": pack5,
    "unpack5": unpack5,
    "lloyd_step": lloyd_step,
}
