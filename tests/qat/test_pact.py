"""PACT: a learned clip, its gradients in closed form, and what it is stored as."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlab.formats import IntAffine
from qlab.qat import PACT, clipping_levels, pact


@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([1e-6, 0.3, 1.0, 7.0, 1e5]))
def test_closed_form(seed, bits, level):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 40, generator=g) * level).requires_grad_()
    alpha, cotangent = torch.tensor(level, requires_grad=True), torch.randn(3, 40, generator=g)
    y = pact(x, alpha, bits)
    (y * cotangent).sum().backward()
    x64, a, steps = x.detach().double(), alpha.item(), 2**bits - 1
    clipped = 0.5 * (x64.abs() - (x64 - a).abs() + a)  # eq. (1) as the paper writes it
    exact = (clipped * steps / a).round() * a / steps
    tie = ((clipped * steps / a) % 1 - 0.5).abs() < 1e-4
    torch.testing.assert_close(y.double()[~tie], exact[~tie], rtol=1e-5, atol=1e-6 * a)
    assert torch.equal(x.grad, cotangent * ((x64 >= 0) & (x64 < a)))
    torch.testing.assert_close(alpha.grad, (cotangent * (x64 >= a)).sum(), rtol=1e-4, atol=1e-5)
    fmt = IntAffine(bits, False, "tensor")
    params = fmt.from_range(torch.tensor(0.0), alpha.detach())
    assert torch.equal(y, fmt.decode(fmt.encode(x, params), params))


def test_the_ends_by_hand():
    x = torch.tensor([-0.1, 0.0, 1.9, 2.0, 2.1], requires_grad=True)
    alpha = torch.tensor(2.0, requires_grad=True)
    pact(x, alpha, 4).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 0] and alpha.grad == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored(dtype):
    act, x = PACT(bits=3, alpha=1.7), torch.randn(4, 9).mul(2).to(dtype)
    assert list(act.state_dict()) == ["alpha"]
    assert act(x).dtype == dtype and torch.equal(act.act_quant()(x), act(x))
    x.requires_grad_()
    act(x).float().sum().backward()
    assert act.alpha.grad == (x.detach() >= act.alpha).sum()


def test_alphas_are_collected_once_and_l2_pulls_them_down():
    shared = PACT(4, alpha=8.0)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(shared, PACT(4, alpha=3.0)), nn.ReLU())
    alphas = clipping_levels(model)
    assert [alpha.item() for alpha in alphas] == [8.0, 3.0] and alphas[0] is shared.alpha
    x = torch.randn(64, 4)
    optimizer = torch.optim.SGD(alphas, lr=0.1)
    before = [alpha.item() for alpha in alphas]
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).sum() * 0 + 0.1 * sum(alpha.square() for alpha in alphas)).backward()
        optimizer.step()
    assert all(alpha < old for alpha, old in zip(alphas, before, strict=True))


def test_alpha_follows_the_task():
    """Targets up to 5, α from 1: only α can reach them."""
    x = torch.linspace(0, 5, 200)
    act = PACT(8, alpha=1.0)
    optimizer = torch.optim.Adam(act.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (act(x) - x).square().mean().backward()
        optimizer.step()
    assert 4.5 < act.alpha.item() < 5.5


def test_mistakes():
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is a clipping level above 0"):
            PACT(4, alpha)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        PACT(9)
    act = PACT(4)
    act.alpha.data.fill_(-0.5)
    with pytest.raises(RuntimeError, match="has become -0.5"):
        act(torch.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        PACT(4)(torch.tensor([float("nan")]))
    with pytest.raises(TypeError):
        PACT(4)(torch.ones(2, dtype=torch.long))
    assert PACT(4)(torch.ones(0, 3)).shape == (0, 3)
