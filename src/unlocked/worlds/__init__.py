"""What waiting means. A world runs the programs of its workers and returns the timeline of what happened."""

from .base import World
from .distributed import Distributed
from .in_process import InProcess
from .simulated import Simulated

__all__ = ["Distributed", "InProcess", "Simulated", "World"]
