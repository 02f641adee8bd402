"""Packing: every width, every length, exact bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.packing import pack, unpack, unpack_values


def bits_as_text(codes, bits):
    """The definition: write each code in binary, join, cut into bytes."""
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


@given(st.integers(1, 8), st.data())
def test_equals_the_bits_written_out(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == bits_as_text(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    values = torch.linspace(-1, 1, 2**bits)
    assert torch.equal(unpack_values(packed, values, len(codes)), values[codes])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [2**20, 2**20 + 1])
def test_large_tensors_are_looked_up_by_pairs_of_bytes(bits, n):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8)
    values = torch.randn(2**bits)
    packed = pack(codes, bits)
    assert torch.equal(unpack_values(packed, values, n), values[codes.int()])
    odd_offset = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    assert torch.equal(unpack_values(odd_offset, values, n), values[codes.int()])


def test_high_nibble_first():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x12, 0x30]


def test_packed_memory_is_its_own():
    packed = pack(torch.zeros(3, 5, dtype=torch.uint8), 3)
    assert packed.untyped_storage().nbytes() == 6  # ceil(15 · 3 / 8)


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack(torch.zeros(1, dtype=torch.uint8), bits)


def test_refuses_a_code_too_large():
    with pytest.raises(ValueError, match="a code of 8 does not fit in 3 bits"):
        pack(torch.tensor([8], dtype=torch.uint8), 3)


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="int64"):
        pack(torch.tensor([1]), 3)


def test_refuses_truncated_bytes():
    with pytest.raises(ValueError, match="10 codes of 4 bits take 5 bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 10)
