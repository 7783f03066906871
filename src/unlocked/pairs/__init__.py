"""Losses over pairs of views, for self-supervised learning. z (2B, D): two views of each image, one after the other."""

from __future__ import annotations

from .barlow_twins import BarlowTwins
from .base import Judged, PairLoss, check_pairs, partners
from .easy import EasyNTXent, ratios, thresholds
from .false_negatives import FalseNegatives
from .hard_negatives import HardNegatives
from .nt_xent import NTXent
from .oracle import OracleNTXent
from .subsampled import SubsampledNTXent
from .vicreg import VICReg

PAIR_LOSSES: dict[str, PairLoss] = {
    "nt-xent": NTXent(),
    "hard-negatives": HardNegatives(),
    "debiased": HardNegatives(beta=0.0),
    "false-negatives": FalseNegatives(),
    "barlow-twins": BarlowTwins(),
    "vicreg": VICReg(),
}

__all__ = [
    "PAIR_LOSSES",
    "BarlowTwins",
    "EasyNTXent",
    "FalseNegatives",
    "HardNegatives",
    "Judged",
    "NTXent",
    "OracleNTXent",
    "PairLoss",
    "SubsampledNTXent",
    "VICReg",
    "check_pairs",
    "partners",
    "ratios",
    "thresholds",
]
