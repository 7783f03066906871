"""Neuron groups: a model as K depth modules of G groups each, which see each other's outputs only at boundaries."""

from . import models  # noqa: F401  # makes our own blocks known to `narrow`
from .cutting import from_grouped_recipe, grouped
from .slicing import CannotDivide, Share, SliceOf, narrow

__all__ = ["CannotDivide", "Share", "SliceOf", "from_grouped_recipe", "grouped", "narrow"]
