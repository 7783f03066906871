"""Fewer bytes for a row of values: rounding to int8 by blocks, the largest entries, and error feedback.

    int8      m_b = max_{i∈b} |x_i|,   c_i = round(127 x_i / m_b) ∈ {−127..127},   x̂_i = (c_i / 127) m_b
    top-k     x̂_i = x_i if |x_i| is among the k largest, else 0
    feedback  x̂_t = C(x_t + e_t),   e_{t+1} = x_t + e_t − x̂_t,   e_0 = 0       (Seide et al., 2014; Karimireddy et al., 2019)

    x the row, b a block of neighbours, m_b / 127 its scale, x̂ what the receiver has, C any compression, e what is still owed.

The largest magnitude m_b travels, not the scale: so ±m_b come out exactly. Error of int8: at most half a scale per value
(stochastic rounding: one scale, and zero in the mean). Of top-k: ‖x − x̂‖² ≤ (1 − k/n) ‖x‖². With feedback nothing is lost:
Σ_t x̂_t + e_T = Σ_t x_t. Limits: k = n changes nothing; neither does feedback where C does not.

A value that is no number is not hidden: its whole block comes out as NaN (int8), or it counts as the largest (top-k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Sent = TypeVar("Sent")

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as so many bytes
# the least that a block's largest magnitude counts as: smaller numbers have fewer digits, or are flushed to zero
_SMALLEST = torch.finfo(torch.float32).tiny


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which one computes with values of this type: at least float32."""
    return torch.promote_types(dtype, torch.float32)


# ---- int8 ------------------------------------------------------------------------------------------------------------


def quantised(row: Tensor, block: int, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block (⌈n/block⌉,) float32, and codes (n,) int8, of a row (n,).

    Rounds to nearest even; given `uniform` (n,), numbers from [0, 1), up or down at random so that the mean is exact.
    A block with a value that is no finite float32 has the magnitude NaN, and its codes mean nothing. Where all magnitudes of
    a block lie below 1.2e-38, that counts as the largest.
    """
    values = row.detach().to(wide(row.dtype))
    codes = torch.empty(row.shape, dtype=torch.int8, device=row.device)
    largest = torch.empty(-(-len(row) // block), dtype=torch.float32, device=row.device)
    draws = [None, None] if uniform is None else _blocks(uniform.to(values.dtype), block)
    for x, code, m, draw in zip(_blocks(values, block), _blocks(codes, block), _of_blocks(largest, row, block), draws):
        code.copy_(_rounded(x, _magnitudes(x, m), draw))
    return largest, codes


def restored(largest: Tensor, codes: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The values (n,) of the codes (n,), in this type."""
    values = codes.to(wide(dtype)).div_(127)
    for x, m in zip(_blocks(values, block), _of_blocks(largest, codes, block)):
        x.mul_(m[:, None])
    return values.to(dtype)


def _magnitudes(x: Tensor, into: Tensor) -> Tensor:
    """The largest magnitude of each row of x (b, k), written into (b,)."""
    into.copy_(x.abs().amax(dim=1))
    return into.masked_fill_(~into.isfinite(), torch.nan).clamp_(min=_SMALLEST)


def _rounded(x: Tensor, m: Tensor, uniform: Tensor | None) -> Tensor:
    """The codes of x (b, k), still as floats."""
    scaled = (x / m[:, None]).mul_(127)
    return scaled.round_() if uniform is None else _up_or_down(scaled, uniform)


def _up_or_down(x: Tensor, uniform: Tensor) -> Tensor:
    """Up with the probability of what is above the whole number below; that number itself where nothing is."""
    below = x.floor()
    below += uniform < x - below
    return below.clamp_(-127, 127)  # float64: the magnitude may have been rounded down


def _blocks(row: Tensor, block: int) -> list[Tensor]:
    """Views of a row: its whole blocks (b, block), and what is left over, if anything is (1, rest)."""
    count = len(row) // block
    rest = row[count * block :]
    return [row[: count * block].view(count, block), *([rest[None]] if len(rest) else [])]


def _of_blocks(each: Tensor, row: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What belongs to the whole blocks of a row, and to the one left over."""
    count = len(row) // block
    return each[:count], each[count:]


# ---- top-k -----------------------------------------------------------------------------------------------------------


def kept(count: int, share: float) -> int:
    """k = max(1, round(share · n)) of n values; none of none."""
    return min(count, max(1, round(share * count)))


def largest_entries(row: Tensor, k: int) -> Tensor:
    """Where the k entries of largest magnitude are (k,) int64, ascending; of equal ones the first. NaN is above infinity.

    The order is that of the bits without the sign: for floats it is that of the magnitudes. `torch.topk` promises nothing
    about equal ones.
    """
    bits = row.detach().view(_BITS[row.element_size()])
    magnitudes = bits & torch.iinfo(bits.dtype).max  # all bits but the sign
    # numpy's selection is ten times faster than torch's on the CPU
    return selected(magnitudes.numpy(), k) if magnitudes.device.type == "cpu" else first_sorted(magnitudes, k)


def first_sorted(values: Tensor, k: int) -> Tensor:
    """Where the k largest integers are (k,) int64, ascending; of equal ones the first. By a stable sort, on any device."""
    return values.sort(descending=True, stable=True).indices[:k].sort().values


def selected(values: np.ndarray, k: int) -> Tensor:
    """The same by selection, without sorting."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    kth = np.partition(values, len(values) - k)[len(values) - k]
    where = np.flatnonzero(values >= kth)
    equal = np.flatnonzero(values[where] == kth)
    surplus = equal[len(equal) - (len(where) - k) :]  # the last of those that equal the k-th
    return torch.from_numpy(np.delete(where, surplus))


# ---- error feedback --------------------------------------------------------------------------------------------------


def with_feedback(
    row: Tensor, owed: Tensor | None, encode: Callable[[Tensor], Sent], decode: Callable[[Sent], Tensor]
) -> tuple[Sent, Tensor]:
    """What is sent for a row (n,) and what was `owed` before (n,), or None; and what is owed now (n,).

    What is owed is kept in at least float32; `encode` is given the row's own type.
    """
    wanted = row.detach().to(wide(row.dtype))
    if owed is not None:
        wanted = wanted + owed
    sent = encode(wanted.to(row.dtype))
    return sent, wanted - decode(sent).to(wanted.dtype)
