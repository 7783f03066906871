"""The header of a message: 192 bytes that say what the body is.

    kind (1 byte), dtype (1), dimensions (1), slot (1), 4 unused, bytes of the body (8), 8 sizes (64), 8 strides (64),
    48 unused, so that a body behind it is aligned to 64 bytes

Strides travel because they choose kernels: a tensor in channels-last order must arrive in it for the numbers to be the same.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnlockedError

HEADER_BYTES = 192
MESSAGE, GROW, END = 0, 1, 2  # a tensor; the receiver needs room for bodies of so many bytes; nothing comes any more

_FORM = struct.Struct("<BBBB4xq8q8q")
_DIMENSIONS = 8
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class Header(NamedTuple):
    """`slot`: of the ring, for shared memory. `size`: bytes of the body (MESSAGE) or of the room wanted (GROW)."""

    kind: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    slot: int
    size: int

    def pack(self) -> bytes:
        """As HEADER_BYTES bytes."""
        rest = _DIMENSIONS - len(self.shape)
        shape, stride = (*self.shape, *[0] * rest), (*self.stride, *[0] * rest)
        packed = _FORM.pack(self.kind, _CODES[self.dtype], len(self.shape), self.slot, self.size, *shape, *stride)
        return packed.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """The inverse of `pack`."""
        kind, code, dimensions, slot, size, *numbers = _FORM.unpack(data[: _FORM.size])
        shape, stride = numbers[:dimensions], numbers[_DIMENSIONS : _DIMENSIONS + dimensions]
        return cls(kind, _DTYPES[code], tuple(shape), tuple(stride), slot, size)

    def view(self, body: Tensor) -> Tensor:
        """The tensor whose body lies at the start of `body`, a row of at least `size` bytes."""
        flat = body[: self.size].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


def dense(x: Tensor) -> Tensor:
    """`x` itself if its elements fill one block of memory, in whatever order; else a contiguous copy."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size == 1:
            continue
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def header_of(x: Tensor, slot: int = 0) -> Header:
    """The header of a dense tensor. Raises UnlockedError for what no message can carry."""
    if x.dtype not in _CODES or x.dim() > _DIMENSIONS:
        raise UnlockedError(
            f"A {x.dim()}-dimensional tensor of {x.dtype} cannot be sent; messages have up to {_DIMENSIONS} dimensions of a "
            "float, integer, bool or complex type."
        )
    return Header(MESSAGE, x.dtype, tuple(x.shape), tuple(x.stride()), slot, x.numel() * x.element_size())


def room(size: int) -> Header:
    """A header that asks for room."""
    return Header(GROW, torch.uint8, (), (), 0, size)


def goodbye() -> Header:
    """A header that ends the channel."""
    return Header(END, torch.uint8, (), (), 0, 0)
