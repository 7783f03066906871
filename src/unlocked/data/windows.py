"""Bytes as samples of language modelling: windows of `context` bytes, and for each byte the next one as its target."""

from __future__ import annotations

import torch
from torch import Tensor

from .order import Moment


def count(length: int, context: int) -> int:
    """Non-overlapping windows of `context` bytes in `length` bytes when the last one, too, has its next byte."""
    return (length - 1) // context


def offset(length: int, context: int, moment: Moment) -> int:
    """Where an epoch's first window begins: uniform over the bytes that the windows leave free, so that their number
    stays the same. A text of a whole number of contexts leaves context − 1 bytes free: every phase occurs."""
    free = length - 1 - count(length, context) * context
    return int(torch.randint(free + 1, (), generator=moment.numbers("offset")))


def cut(text: Tensor, index_B: Tensor, context: int, offset: int) -> tuple[Tensor, Tensor]:
    """Windows number `index_B` of a uint8 text: inputs (B, context) int64 and targets, the same bytes one later."""
    begin_B1 = offset + context * index_B[:, None]
    within = torch.arange(context + 1, device=text.device)
    window = text[begin_B1 + within].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
