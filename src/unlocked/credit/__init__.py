"""Credit rules: where a stage's gradient comes from. One file each."""

from .async_dgl import AsyncDGL
from .backprop import Backprop
from .base import Credit
from .cdp_pipeline import CDPPipeline
from .ddg import DDG
from .delayed import Delayed
from .delayed_gradients import DelayedGradients
from .dgl import DGL
from .dgssl import DGSSL
from .dgssl_llm import DGSSLLLM
from .fdg import FDG
from .features_replay import FeaturesReplay
from .forward_gradient import ForwardGradient
from .gn_dgl import GNDGL
from .gpipe import GPipe
from .greedy import Greedy
from .infopro import InfoPro
from .interlocking import Interlocking
from .local_forward_gradient import LocalForwardGradient
from .mezo import MeZO
from .node_perturbation import NodePerturbation
from .one_f_one_b import OneFOneB
from .oracle_simclr import OracleSimCLR
from .petra import PETRA
from .pipedream import PipeDream
from .pipedream_2bw import PipeDream2BW
from .predsim import PredSim
from .simclr import SimCLR
from .subsampled_simclr import SubsampledSimCLR
from .torch_pipelining import TorchGPipe, TorchOneFOneB

ALL: tuple[type[Credit], ...] = (
    Backprop,
    GPipe,
    OneFOneB,
    Greedy,
    DGL,
    AsyncDGL,
    PredSim,
    InfoPro,
    GNDGL,
    Interlocking,
    ForwardGradient,
    LocalForwardGradient,
    NodePerturbation,
    MeZO,
    SimCLR,
    DGSSL,
    SubsampledSimCLR,
    OracleSimCLR,
    DGSSLLLM,
    PipeDream,
    PipeDream2BW,
    CDPPipeline,
    DelayedGradients,
    DDG,
    FeaturesReplay,
    FDG,
    PETRA,
    TorchGPipe,
    TorchOneFOneB,
)

__all__ = [
    "ALL",
    "DDG",
    "DGL",
    "DGSSL",
    "DGSSLLLM",
    "FDG",
    "GNDGL",
    "PETRA",
    "AsyncDGL",
    "Backprop",
    "CDPPipeline",
    "Credit",
    "Delayed",
    "DelayedGradients",
    "FeaturesReplay",
    "ForwardGradient",
    "GPipe",
    "Greedy",
    "InfoPro",
    "Interlocking",
    "LocalForwardGradient",
    "MeZO",
    "NodePerturbation",
    "OneFOneB",
    "OracleSimCLR",
    "PipeDream",
    "PipeDream2BW",
    "PredSim",
    "SimCLR",
    "SubsampledSimCLR",
    "TorchGPipe",
    "TorchOneFOneB",
]
