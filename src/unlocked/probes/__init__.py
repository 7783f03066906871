"""Instruments that look at a training run without changing it.

found = ul.probes.explain(trainer, train, test)     why local learning leaves a gap: see representation.py
found.plot("gap.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_first_use

if TYPE_CHECKING:
    from .explanation import Explanation, draw
    from .recipe import Recipe
    from .representation import explain

_HOMES = {"Explanation": "explanation", "draw": "explanation", "Recipe": "recipe", "explain": "representation"}
__all__ = ["Explanation", "Recipe", "draw", "explain"]
__getattr__ = on_first_use(__name__, _HOMES)  # most of the library imports this package for other instruments
