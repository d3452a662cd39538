"""Several small codes in a byte, and typed numbers as bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """``[n]`` uint8 codes below ``2**bits`` to ``[ceil(n * bits / 8)]`` uint8; ``bits`` is 1, 2, 4 or 8, lowest bits first."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    missing = -codes.numel() % per_byte
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing)])
    columns = codes.view(-1, per_byte)
    packed = columns[:, 0].clone()
    for place in range(1, per_byte):
        packed |= columns[:, place] << (bits * place)
    return packed


def unpack(packed: Tensor, *, bits: int, numel: int, meaning: Tensor) -> Tensor:
    """What the first ``numel`` codes of ``pack`` stand for: ``meaning`` has an entry for each of ``2**bits``; ``[numel]``, its dtype."""
    # All codes of a byte at once: a table of 256 rows is much faster than shifting every byte 8 / bits times.
    shifts = torch.arange(0, 8, bits, device=packed.device)
    codes = (torch.arange(256, device=packed.device)[:, None] >> shifts) & (2**bits - 1)
    return meaning[codes].index_select(0, packed.int()).view(-1)[:numel]


def as_bytes(*tensors: Tensor) -> Tensor:
    """One ``[m]`` uint8 tensor with the bytes of contiguous tensors of any type, one after the other."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def read(payload: Tensor, *, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` numbers that begin at byte ``start``."""
    width = torch.empty(0, dtype=dtype).element_size()
    # A copy: a view as wider numbers must begin where such numbers may.
    return payload[start : start + count * width].clone().view(dtype)
