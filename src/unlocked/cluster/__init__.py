"""The processes of one run: how they find each other, agree, notice that one is gone, and stop together."""

from .alone import Alone
from .base import Crew
from .cluster import Cluster

__all__ = ["Alone", "Cluster", "Crew"]
