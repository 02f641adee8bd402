"""Layers as bitsandbytes stores them: key by key what its own state dict holds."""

import json

import pytest
import torch

from qlab.adapters.stored import BLOCK_SIZES, SLAB, Storage, storage_of
from qlab.models import guard_bitsandbytes
from qlab.nn import weight_of

guard_bitsandbytes()
import bitsandbytes  # noqa: E402 (after the guard, which quiets its import)


def weight(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def four_bit(w, storage):
    layer = bitsandbytes.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type=storage.format)
    layer.weight = bitsandbytes.nn.Params4bit(
        w.clone(), False, None, storage.block_size, storage.double_quant, storage.format, module=layer
    )
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [Storage("nf4"), Storage("fp4", 256), Storage("nf4", double_quant=True)], ids=str)
def test_four_bit_is_what_bitsandbytes_stores(storage, dtype):
    w = weight((48, 128), dtype)
    layer, stored = four_bit(w, storage), storage.encode(w)
    expected = layer.state_dict()
    assert stored.keys() == expected.keys() == storage.specs(w.shape, dtype).keys()
    for key, tensor in stored.items():
        assert storage.specs(tuple(w.shape), dtype)[key] == (tensor.dtype, tuple(tensor.shape))
        if "quant_state" in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(expected[key].tolist()))
        else:
            assert torch.equal(tensor, expected[key]), key
    assert torch.equal(storage.decode(stored), weight_of(layer)) and storage.decode(stored).dtype == dtype


@pytest.mark.parametrize("shape", [(3, SLAB // 2 + 64), (1100, 1024), (5, 33), (1, 1)])
@pytest.mark.parametrize("storage", [Storage("nf4"), Storage("fp4", 4096, True)], ids=str)
def test_slabs_change_nothing(shape, storage):
    w = weight(shape)
    whole, stored = storage.codebook.quantize(w), storage.encode(w)
    assert torch.equal(stored["weight"].reshape(-1), whole.packed)
    assert torch.equal(storage.decode(stored), whole.dequantize())
    count = min(256, w.numel())
    assert torch.equal(storage.first_values(w, 256), storage.codebook.levels[whole.codes.reshape(-1)[:count].int()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_is_what_bitsandbytes_stores(dtype):
    w = weight((1100, 1024), dtype)
    layer = bitsandbytes.nn.Linear8bitLt(1024, 1100, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(w.clone(), requires_grad=False)
    expected, stored = layer.to("cpu").state_dict(), Storage("int8").encode(w)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    theirs = bitsandbytes.functional.int8_vectorwise_dequant(expected["weight"], expected["SCB"])
    assert torch.equal(Storage("int8").decode(stored), theirs)
    zero = Storage("int8").encode(torch.zeros(2, 4))
    assert torch.equal(Storage("int8").decode(zero), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_nan_is_refused(name):
    w = weight((4, 64))
    w[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 NaN"):
        Storage(name).encode(w)


def test_the_header_can_be_written_before_the_mean_of_absmax_is_known():
    storage = Storage("nf4", double_quant=True)
    key = "weight.quant_state.bitsandbytes__nf4"
    for size in (1e-30, 1.0, 1e30, 3.14159e-7):
        w = weight((64, 512)) * size
        assert len(storage.encode(w)[key]) == storage.specs(tuple(w.shape), w.dtype)[key][1][0]


def test_settings():
    assert [Storage("nf4", size).block_size for size in BLOCK_SIZES] == [32, 64, 128, 256, 512, 1024, 2048, 4096]
    with pytest.raises(ValueError, match="not of 100"):
        Storage("nf4", 100)
    with pytest.raises(ValueError, match="quantized by 'awq'"):
        storage_of({"quant_method": "awq"}, None)
    with pytest.raises(ValueError, match="neither load_in_4bit nor load_in_8bit"):
        storage_of({"quant_method": "bitsandbytes"}, None)
    with pytest.raises(ValueError, match="keeps its codes as bfloat16"):
        storage_of({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, b"{}")
    assert storage_of({"load_in_8bit": True}, None) == Storage("int8")
