"""Consensus rules: what happens to a gradient among the replicas. One file each."""

from .all_reduce import AllReduce
from .base import Consensus
from .independent import Independent
from .wash import WASH

ALL: tuple[type[Consensus], ...] = (Independent, AllReduce, WASH)

__all__ = ["ALL", "WASH", "AllReduce", "Consensus", "Independent"]
