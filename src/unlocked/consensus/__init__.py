"""Consensus rules: what happens to a gradient among the replicas. One file each."""

from .acco import ACCO
from .all_reduce import AllReduce
from .base import Consensus
from .cdp import CDP
from .dpu import DPU, WP
from .independent import Independent
from .torch_data_parallel import TorchDDP
from .torch_fully_shard import TorchFullyShard
from .torch_zero1 import TorchZeRO1
from .wash import WASH

ALL: tuple[type[Consensus], ...] = (
    Independent,
    AllReduce,
    WASH,
    CDP,
    ACCO,
    DPU,
    WP,
    TorchDDP,
    TorchFullyShard,
    TorchZeRO1,
)

__all__ = [
    "ACCO",
    "ALL",
    "CDP",
    "DPU",
    "WASH",
    "WP",
    "AllReduce",
    "Consensus",
    "Independent",
    "TorchDDP",
    "TorchFullyShard",
    "TorchZeRO1",
]
