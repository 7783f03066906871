"""Consensus rules: what happens to a gradient among the replicas. One file each."""

from .all_reduce import AllReduce
from .base import Consensus
from .independent import Independent
from .torch_data_parallel import TorchDDP
from .torch_fully_shard import TorchFullyShard
from .wash import WASH

ALL: tuple[type[Consensus], ...] = (Independent, AllReduce, WASH, TorchDDP, TorchFullyShard)

__all__ = ["ALL", "WASH", "AllReduce", "Consensus", "Independent", "TorchDDP", "TorchFullyShard"]
