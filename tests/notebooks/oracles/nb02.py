"""Notebook 02: blocks that share a scale, and symmetric rounding inside them, against qlab.formats."""

import torch

from qlab.formats import IntAffine

W = torch.randn(12, 24, generator=torch.Generator().manual_seed(2)) ** 3  # heavy tails: every block has its own scale


def formats(bits=4):
    """(granularity in the lesson's words, its size argument, the same in qlab)."""
    yield "tensor", None, IntAffine(bits, granularity="tensor")
    yield "channel", None, IntAffine(bits, granularity="channel")
    yield "group", 8, IntAffine(bits, granularity="group", group_size=8)
    yield "head rows", 3, IntAffine(bits, granularity="head", heads=3)
    yield "head columns", 3, IntAffine(bits, granularity="head", heads=3, head_axis=1)


def cut(function):
    for granularity, size, fmt in formats():
        blocks = fmt.blocks(W)
        assert torch.equal(function(W, granularity, size), blocks.reshape(-1, blocks.shape[-1])), granularity


def quantize_blocks(function):
    for bits in range(2, 9):
        for granularity, _, fmt in formats(bits):
            q = fmt.quantize(W)
            blocks, values = (fmt.blocks(x).reshape(-1, fmt.blocks(x).shape[-1]) for x in (W, q.dequantize()))
            w_hat, scale = function(blocks, bits)
            assert torch.equal(scale, q.params["scale"].reshape(-1)), (granularity, bits)
            assert torch.equal(w_hat, values), (granularity, bits)
    ties = torch.arange(1, 201).unsqueeze(1) / 30 * torch.arange(-14, 15) / 2  # half steps, to the even neighbour
    assert torch.equal(function(ties, 4)[0], IntAffine(4).quantize(ties).dequantize())


ORACLES = {"cut": cut, "quantize_blocks": quantize_blocks}
