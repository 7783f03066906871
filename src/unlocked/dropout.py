"""Dropout that draws the same numbers under torch.func as without it.

PyTorch draws a mask in the order of its input's memory, but under torch.func in the order of its indices; they differ for what
is transposed or in channels_last (tokens after MultiheadAttention, maps). With `InOrder` masks are always drawn in the order of
indices, so a second run in forward mode has the dropout of the first. Fused attention draws its mask inside the kernel, and has
no forward mode: with `InOrder` attention with dropout always runs in PyTorch's math kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_DROPOUTS = (F.dropout, F.alpha_dropout, torch.dropout, torch.alpha_dropout)  # others draw a mask without an order


class InOrder(TorchFunctionMode):
    """Context manager: dropout reads a copy of its input whose memory is in the order of its indices, where it is not;
    attention with dropout is not fused."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or any(args[4:5])):
            with sdpa_kernel(SDPBackend.MATH):
                return function(*args, **kwargs)
        if function not in _DROPOUTS or not args or args[0].is_contiguous():
            return function(*args, **kwargs)
        inplace = kwargs.pop("inplace", False)
        found = function(args[0].contiguous(), *args[1:], **kwargs)
        return args[0].copy_(found) if inplace else found
