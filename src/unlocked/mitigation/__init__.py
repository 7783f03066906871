"""Mitigations: what is done about delayed gradients. One file each; see base.py."""

from .base import Mitigation
from .delay_compensation import DelayCompensation
from .gap_aware import GapAware
from .staleness_aware import StalenessAware
from .weight_prediction import WeightPrediction

ALL: tuple[type[Mitigation], ...] = (StalenessAware, GapAware, DelayCompensation, WeightPrediction)

__all__ = ["ALL", "DelayCompensation", "GapAware", "Mitigation", "StalenessAware", "WeightPrediction"]
