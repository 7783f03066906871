"""What a trainer refuses before anything is made, in sentences."""

from __future__ import annotations

from typing import Any

import torch

from .chain import Chain
from .consensus.base import Consensus
from .credit.base import Credit
from .errors import InvalidChoice
from .worlds import Distributed, InProcess, World


def check_world(world: World, credit: Credit, consensus: Consensus, workers: int) -> None:
    """Rules that leave the communicating to PyTorch want a process for every worker, some want one for all."""
    if consensus.needs_one_process and world.crew.size > 1:
        raise InvalidChoice(
            f"{consensus!r} keeps all replicas on one device, in one process, got {world.crew.size} processes; start one, or "
            "take another form."
        )
    if consensus.free and isinstance(world, InProcess):
        raise InvalidChoice(
            f"{consensus!r} lets replicas run as fast as they can, which means nothing in one process without a clock; take "
            "--world simulated or distributed, or pairing='clocks', which gives the same numbers everywhere."
        )
    for rule in (credit, consensus):
        if rule.needs_processes and (not isinstance(world, Distributed) or world.crew.size != workers):
            raise InvalidChoice(
                f"{rule.name} leaves the communicating to PyTorch and needs a process for each of the {workers} workers, got "
                f"{world.crew.size}; start it with 'unlocked launch --processes {workers} -- train …' or compare with "
                "--world distributed."
            )


def device_of(chain: Chain) -> torch.device:
    return next((parameter.device for parameter in chain.parameters()), torch.device("cpu"))


def check_arguments(chain: Any, replicas: int, accumulate: int, clip: float | None) -> None:
    if not isinstance(chain, Chain):
        raise InvalidChoice(
            f"Trainer takes a Chain, got {type(chain).__name__}; make one with ul.cut(model, stages=…, like=x)."
        )
    if not isinstance(replicas, int) or replicas < 1:
        raise InvalidChoice(f"replicas={replicas} is not possible; give a whole number of at least 1.")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise InvalidChoice(f"accumulate={accumulate} is not possible; give a whole number of at least 1.")
    if clip is not None and not clip > 0:
        raise InvalidChoice(f"clip={clip} is not possible; give a positive norm, or None.")
