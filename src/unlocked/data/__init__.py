"""Data in memory whose batches are a pure function of (seed, epoch, replica, batch number)."""

from .dataset import Data
from .domains import Domains
from .loading import load
from .tensors import as_data, from_tensors

__all__ = ["Data", "Domains", "as_data", "from_tensors", "load"]
