"""Credit rules: where a stage's gradient comes from. One file each."""

from .backprop import Backprop
from .base import Credit
from .dgl import DGL
from .gpipe import GPipe
from .greedy import Greedy
from .interlocking import Interlocking
from .predsim import PredSim
from .torch_pipelining import TorchGPipe, TorchOneFOneB

ALL: tuple[type[Credit], ...] = (Backprop, GPipe, Greedy, DGL, PredSim, Interlocking, TorchGPipe, TorchOneFOneB)

__all__ = [
    "ALL",
    "DGL",
    "Backprop",
    "Credit",
    "GPipe",
    "Greedy",
    "Interlocking",
    "PredSim",
    "TorchGPipe",
    "TorchOneFOneB",
]
