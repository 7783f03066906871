"""Optimal rates of a graph's edges (Oyallon §5.2)."""

from .constraints import Constraint
from .solving import Optimal, optimal_rates

__all__ = ["Constraint", "Optimal", "optimal_rates"]
