"""Codes packed without gaps: `bits` bits each, for 1 to 8 bits, the first code in the high bits of the first byte.

At 4 bits this is the layout of bitsandbytes (first code in the HIGH nibble). Where a code's width does not divide 8,
codes cross byte borders: 8 codes of 3 bits fill exactly 3 bytes.

    codes of 3 bits   |000 111 22|2 333 444 5|55 666 777|
    bytes              --- 0 ---- ---- 1 ---- ---- 2 ---

Axis legend: n = number of codes, period = codes until the pattern meets a byte border again.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

ONE_THREAD = 1 << 22  # values that one thread looks up faster as whole rows than all threads do piece by piece


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"packing takes 1 to 8 bits a code, got bits={bits}")


def _layout(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(codes per period, bytes per period, [(code, byte, left shift; negative = right shift)])."""
    codes_per_period, bytes_per_period = math.lcm(bits, 8) // bits, math.lcm(bits, 8) // 8
    places = []
    for code in range(codes_per_period):
        first_bit, end_bit = code * bits, (code + 1) * bits
        for byte in range(first_bit // 8, (end_bit - 1) // 8 + 1):
            places.append((code, byte, 8 * (byte + 1) - end_bit))
    return codes_per_period, bytes_per_period, places


def _shift(x: Tensor, left: int) -> Tensor:
    return x << left if left >= 0 else x >> -left


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into bytes.

    codes: any shape, uint8, values 0 … 2**bits − 1. Returns (ceil(n · bits / 8),) uint8; the last byte is filled with zeros.
    Raises ValueError for bits outside 1–8 and for a code that needs more bits, TypeError for another dtype.

    >>> pack(torch.tensor([0xA, 0xB, 0xC], dtype=torch.uint8), bits=4).tolist() == [0xAB, 0xC0]
    True
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack takes uint8 codes, got {codes.dtype}")
    n = codes.numel()
    if n and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits (largest: {2**bits - 1})")
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.clone()
    codes_per_period, bytes_per_period, places = _layout(bits)
    codes = torch.nn.functional.pad(codes, (0, -n % codes_per_period)).view(-1, codes_per_period)
    packed = torch.zeros(codes.shape[0], bytes_per_period, dtype=torch.uint8, device=codes.device)
    for code, byte, left in places:
        packed[:, byte] |= _shift(codes[:, code], left)
    return packed.view(-1)[: -(-n * bits // 8)].clone()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes of `packed`: (n,) uint8. Raises ValueError if `packed` is not exactly as long as n codes need.

    >>> unpack(torch.tensor([0xAB, 0xC0], dtype=torch.uint8), bits=4, n=3).tolist() == [0xA, 0xB, 0xC]
    True
    """
    _check_bits(bits)
    expected = -(-n * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{n} codes of {bits} bits take {expected} bytes (uint8), got {tuple(packed.shape)} of {packed.dtype}"
        )
    if bits == 8:
        return packed.clone()
    codes_per_period, bytes_per_period, places = _layout(bits)
    packed = torch.nn.functional.pad(packed, (0, -expected % bytes_per_period)).view(-1, bytes_per_period)
    codes = torch.zeros(packed.shape[0], codes_per_period, dtype=torch.uint8, device=packed.device)
    for code, byte, left in places:
        codes[:, code] |= _shift(packed[:, byte], -left)
    return codes.view(-1)[:n] & (2**bits - 1)


def unpack_values(packed: Tensor, values: Tensor, n: int) -> Tensor:
    """`values[unpack(packed)]` in one step: (n,) in the dtype of `values`, which is (2**bits,), on the device of
    `packed`. Tables are kept for the values used last: pass the same tensor again.

    Where whole codes fill a byte (1, 2, 4, 8 bits), a table with one row per byte holds the 8/bits values that it stands
    for: one look-up for two 4-bit weights, and the codes are never written out. A tensor larger than a table over pairs
    of bytes uses that one, at half the look-ups.
    """
    bits = len(values).bit_length() - 1
    if 8 % bits:
        return values.to(packed.device)[unpack(packed, bits, n).int()]
    pairs = packed.numel() > 2**16 and packed.numel() % 2 == 0 and packed.storage_offset() % 2 == 0
    index_dtype = torch.uint16 if pairs else torch.uint8
    table = _value_table(values, bits, index_dtype, packed.device, whole=n <= ONE_THREAD)
    return table.index_select(0, packed.view(index_dtype).int()).view(values.dtype).view(-1)[:n]


@lru_cache(maxsize=16)
def _value_table(values: Tensor, bits: int, index_dtype: torch.dtype, device: torch.device, whole: bool) -> Tensor:
    """(256 or 65536, …): the values held by every byte, or by every two. whole: a row of 8 or 16 bytes is one float64 or
    complex128, which stand here for so many bytes fetched at once."""
    rows = values.to(device)[_code_table(bits, index_dtype).to(device)]
    wide = {8: torch.float64, 16: torch.complex128}.get(rows.shape[1] * rows.itemsize)
    return rows.view(wide).view(-1) if wide and whole else rows


@lru_cache
def _code_table(bits: int, index_dtype: torch.dtype) -> Tensor:
    """(256 or 65536, codes): the codes held by every value of one byte, or of two read as one number."""
    every = torch.arange(256**index_dtype.itemsize, dtype=torch.int32).to(index_dtype).view(torch.uint8)
    return unpack(every, bits, every.numel() * 8 // bits).view(-1, 8 * index_dtype.itemsize // bits).int()
