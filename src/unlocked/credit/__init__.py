"""Credit rules: where a stage's gradient comes from. One file each."""

from .backprop import Backprop
from .base import Credit
from .dgl import DGL
from .greedy import Greedy
from .interlocking import Interlocking
from .predsim import PredSim
from .torch_pipelining import GPipe, OneFOneB

ALL: tuple[type[Credit], ...] = (Backprop, Greedy, DGL, PredSim, Interlocking, GPipe, OneFOneB)

__all__ = ["ALL", "DGL", "Backprop", "Credit", "GPipe", "Greedy", "Interlocking", "OneFOneB", "PredSim"]
