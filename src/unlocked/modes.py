"""Training and evaluation modes, module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every part is afterwards in the mode it was in (a BatchNorm frozen by hand stays frozen)."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
