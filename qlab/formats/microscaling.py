"""Four-bit floats under scales of eight bits: MXFP4 (OCP) and NVFP4 (NVIDIA).

Rouhani et al. 2023, "Microscaling Data Formats for Deep Learning", arXiv:2310.10537, Algorithm 1, and the OCP
Microscaling Formats (MX) Specification v1.0, section 6.3; NVIDIA 2025, "Pretraining Large Language Models with NVFP4",
arXiv:2509.25149.

    elements    E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the negatives; anything larger saturates at 6
    MXFP4       scale = 2 ** (⌊log2 amax⌋ − 2)            one E8M0 byte per block of 32: a power of 2, nothing else
    NVFP4       tensor_scale = amax of the tensor / (448 · 6)
                scale = E4M3(amax / 6 / tensor_scale)     one E4M3 byte per block of 16
    w' = tensor_scale · scale · element

4 = 2**2 and 6 are the largest power of 2 and the largest value of E2M1, 448 the largest value of E4M3.

Axis legend: row = in, the last axis of a weight; n_blocks = in / block_size.
"""

import torch
from torch import Tensor

from qlab.formats.base import Params
from qlab.formats.blocks import GGUFBlock, RowBlocks

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = torch.tensor(E2M1_MAGNITUDES + tuple(-m for m in E2M1_MAGNITUDES))  # code 8 is −0
E4M3_LARGEST, E4M3_SMALLEST_NORMAL = 448.0, 2.0**-6
SMALLEST_TENSOR_SCALE = 2.0**-120  # 1 / (tensor_scale · scale) must not overflow


def nearest_e2m1(x: Tensor, ties_to_even: bool) -> Tensor:
    """The E2M1 code nearest to x (float32, in units of the scale): uint8, shape of x.

    ties_to_even: True: to the even code, and 0 keeps the sign of x: IEEE 754, as torchao rounds. False: to the first of
    the nearest among codes 0 … 15, which is toward zero and never −0, as ggml rounds.
    """
    magnitudes = E2M1_VALUES[:8].to(x.device)
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    if ties_to_even:  # the codes above midpoints 1, 3, 5 are even: let those midpoints belong to them
        midpoints[1::2] = midpoints[1::2].nextafter(midpoints.new_zeros(()))
    codes = torch.bucketize(x.abs().contiguous(), midpoints, out_int32=True).to(torch.uint8)
    negative = x.signbit() if ties_to_even else (x < 0) & (codes > 0)
    return codes | negative.to(torch.uint8) << 3


class MXFP4(GGUFBlock):
    """E2M1 elements, one power of 2 per block of 32 weights of a row. 4.25 bits a weight. `to_bytes` is GGUF's MXFP4.

    Held to ggml where implementations differ. Against torchao's to_mx (FLOOR): ties go to zero, not to even, and there is
    no −0; log2 is rounded to float32 before the floor, so that an amax a few float32 steps below a power of 2 may count as
    that power. An amax below 2**-125 gets the smallest scale, 2**-127 (gguf lets the exponent wrap around there, which
    makes the block 0). amax between 6 and 8 times the scale saturates: up to a quarter of the largest weight is lost.

    Params: scale (…, n_blocks) float8_e8m0fnu.

    >>> q = MXFP4().quantize(torch.tensor([7.0, -3.5, 0.6, 0.1] * 8))  # scale = 2 ** (2 − 2)
    >>> q.dequantize().tolist()[:4], q.bits_per_weight
    ([6.0, -3.0, 0.5, 0.0], 4.25)
    """

    bits, block_size = 4, 32
    values = E2M1_VALUES
    constants = {"scale": (torch.float8_e8m0fnu, 1)}

    def fit(self, w: Tensor) -> Params:
        amax = self.float_blocks(w).abs().amax(-1)
        exponent = amax.double().log2().float().floor() - 2  # −inf for a block of zeros
        return {"scale": (exponent + 127).clamp(min=0).to(torch.uint8).view(torch.float8_e8m0fnu)}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        x = self.float_blocks(w) / params["scale"].float().unsqueeze(-1)
        return self.unblocks(nearest_e2m1(x, ties_to_even=False), w.shape)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return values.mul_(params["scale"].float().unsqueeze(-1))


class NVFP4(RowBlocks):
    """E2M1 elements, an E4M3 scale per block of 16 weights of a row, a float32 scale per tensor. 4.5 bits a weight.

    torchao's nvfp4_quantize with per_tensor_scale, bit for bit. The scale never falls below 2**-6, the smallest normal
    E4M3 number: a block whose amax is below 1/28672 of the tensor's loses precision. E4M3 rounds the scale by up to 1/16,
    so the largest weight of a block may saturate by as much.

    Params: scale (…, n_blocks) float8_e4m3fn, tensor_scale () float32.
    """

    bits, block_size = 4, 16
    values = E2M1_VALUES
    refits = False  # all groups share the tensor's scale

    def row_params(self, params: Params, shape: torch.Size) -> Params:
        return params | {"tensor_scale": params["tensor_scale"].expand(params["scale"].shape)}

    def fit(self, w: Tensor) -> Params:
        amax = self.float_blocks(w).abs().amax(-1)
        largest = amax.amax() if amax.numel() else amax.new_zeros(())
        tensor_scale = (largest / (E4M3_LARGEST * 6)).clamp(min=SMALLEST_TENSOR_SCALE)
        scale = (amax / 6 / tensor_scale).clamp(min=E4M3_SMALLEST_NORMAL)
        return {"scale": scale.to(torch.float8_e4m3fn), "tensor_scale": tensor_scale}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        x = self.float_blocks(w) * (1 / params["tensor_scale"] / params["scale"].float()).unsqueeze(-1)
        return self.unblocks(nearest_e2m1(x, ties_to_even=True), w.shape)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return values.mul_((params["tensor_scale"] * params["scale"].float()).unsqueeze(-1))
