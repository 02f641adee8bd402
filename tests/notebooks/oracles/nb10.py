"""Notebook 10: QLoRA's forward pass and its ledger of bytes, against LoRALinear on QuantLinear and its tensors."""

import torch
from torch import nn

from qlab.adapters import LoRALinear
from qlab.formats import NF4
from qlab.formats.codebook import dynamic_map
from qlab.nn import QuantLinear


def layer_of(out_features, in_features, r, lora_alpha, block, double_quant=True):
    w = torch.randn(out_features, in_features)
    layer = LoRALinear(QuantLinear(NF4(block, double_quant).quantize(w)), r, lora_alpha)
    nn.init.normal_(layer.lora_B)
    return layer


def qlora_forward(function):
    torch.manual_seed(10)
    for shape, r, alpha, block in (((96, 64), 4, 8, 64), ((40, 128), 3, 7, 32), ((256, 320), 8, 16, 64)):
        layer = layer_of(*shape, r, alpha, block)
        q = layer.base.qtensor
        nested = q.params["absmax_code"], q.params["absmax_scale"], q.params["absmax_offset"]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(17, shape[1]).to(dtype)
            ours = function(
                x, q.codes, nested, q.format.levels, dynamic_map(), layer.lora_A, layer.lora_B, alpha, block, dtype
            )
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, layer(x))
        x = torch.randn(5, shape[1])  # float32 around a bfloat16 product, as bitsandbytes' compute_dtype has it
        factors = layer.lora_A, layer.lora_B
        ours = function(x, q.codes, nested, q.format.levels, dynamic_map(), *factors, alpha, block, torch.bfloat16)
        torch.testing.assert_close(ours, layer.base(x.bfloat16()).float() + layer(x) - layer.base(x))


def predicted(function):
    torch.manual_seed(10)
    for block in (32, 64):
        for double_quant in (False, True):
            layers = [layer_of(*shape, 4, 8, block, double_quant) for shape in ((96, 64), (320, 512))]
            other = nn.Parameter(torch.randn(777).bfloat16(), requires_grad=False)
            trained = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
            optimizer = torch.optim.AdamW(trained)
            sum(layer(torch.randn(3, layer.shape[1])).square().sum() for layer in layers).backward()
            optimizer.step()
            params = [layer.base.qtensor.params for layer in layers]
            main = "absmax_code" if double_quant else "absmax"
            averages = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
            measured = [
                sum(layer.base.packed.nbytes for layer in layers),
                sum(p[main].nbytes for p in params),
                sum(t.nbytes for p in params for name, t in p.items() if name != main),
                other.nbytes,
                sum(p.nbytes for p in trained),
                sum(p.grad.nbytes for p in trained),
                sum(t.nbytes for t in averages),
            ]
            assert list(function([layer.shape for layer in layers], 777, 4, block, double_quant).values()) == measured


ORACLES = {"qlora_forward": qlora_forward, "predicted": predicted}
