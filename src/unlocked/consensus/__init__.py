"""Consensus rules: what happens to a gradient among the replicas. One file each."""

from .acco import ACCO
from .acid import ACiD
from .all_reduce import AllReduce
from .base import Consensus
from .cdp import CDP
from .co2 import CO2
from .d_psgd import DPSGD
from .diloco import DiLoCo
from .dpu import DPU, WP
from .easgd import EASGD
from .gossip import Gossip
from .independent import Independent
from .local_sgd import LocalSGD
from .papa import PAPA
from .papa_all import BTM, PAPA2, PAPAAll
from .sgp import SGP
from .slowmo import SlowMo
from .torch_data_parallel import TorchDDP
from .torch_fully_shard import TorchFullyShard
from .torch_zero1 import TorchZeRO1
from .wash import WASH

ALL: tuple[type[Consensus], ...] = (
    Independent,
    AllReduce,
    WASH,
    PAPA,
    PAPAAll,
    PAPA2,
    BTM,
    LocalSGD,
    SlowMo,
    DiLoCo,
    CO2,
    EASGD,
    Gossip,
    ACiD,
    DPSGD,
    SGP,
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
    "BTM",
    "CDP",
    "CO2",
    "DPSGD",
    "DPU",
    "EASGD",
    "PAPA",
    "PAPA2",
    "SGP",
    "WASH",
    "WP",
    "ACiD",
    "AllReduce",
    "Consensus",
    "DiLoCo",
    "Gossip",
    "Independent",
    "LocalSGD",
    "PAPAAll",
    "SlowMo",
    "TorchDDP",
    "TorchFullyShard",
    "TorchZeRO1",
]
