"""Instruments that look at a training run without changing it.

found = ul.probes.explain(trainer, train, test)     why local learning leaves a gap: see representation.py
found.plot("gap.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explanation import Explanation, draw
    from .recipe import Recipe
    from .representation import explain

_HOMES = {"Explanation": "explanation", "draw": "explanation", "Recipe": "recipe", "explain": "representation"}
__all__ = ["Explanation", "Recipe", "draw", "explain"]


def __getattr__(name: str) -> Any:
    """On first use: most of the library imports this package for other instruments."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
