"""Auxiliary networks ("heads") of local learning, sized under a FLOP budget."""

from .budget import HEADS, HeadLike, HeadReport, build
from .dgl import DGLCNNHead, DGLMLPHead
from .fournier import CNNHead, LinearHead, MLPHead
from .predsim import PredSimHead
from .spec import HeadSpec

__all__ = [
    "HEADS",
    "CNNHead",
    "DGLCNNHead",
    "DGLMLPHead",
    "HeadLike",
    "HeadReport",
    "HeadSpec",
    "LinearHead",
    "MLPHead",
    "PredSimHead",
    "build",
]
