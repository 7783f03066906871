"""One stage in memory at a time; the others in files or in the host's memory (Fournier's thesis, Figure 3.7)."""

from .files import DamagedFile
from .one_stage import OneStage
from .residence import Residence

__all__ = ["DamagedFile", "OneStage", "Residence"]
