"""Auxiliary networks ("heads") of local learning, sized under a FLOP budget."""

from .auglocal import AugLocalHead
from .budget import HEADS, HeadLike, HeadReport, build, spec_at
from .dgl import DGLCNNHead, DGLMLPHead
from .fournier import CNNHead, LinearHead, MLPHead
from .infopro import ConvolutionsAndDenseHead, InfoProHead
from .man import MANHead
from .predsim import PredSimHead
from .projectors import PROJECTORS, ProjectorHead
from .spec import HeadSpec
from .unembedding import SharedUnembeddingHead, UnembeddingHead

__all__ = [
    "HEADS",
    "PROJECTORS",
    "AugLocalHead",
    "CNNHead",
    "ConvolutionsAndDenseHead",
    "DGLCNNHead",
    "DGLMLPHead",
    "HeadLike",
    "HeadReport",
    "HeadSpec",
    "InfoProHead",
    "LinearHead",
    "MANHead",
    "MLPHead",
    "PredSimHead",
    "ProjectorHead",
    "SharedUnembeddingHead",
    "UnembeddingHead",
    "build",
    "spec_at",
]
