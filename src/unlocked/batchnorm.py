"""BatchNorm's running statistics, estimated anew: for the stages of a trainer and for a plain network alike."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .errors import InvalidChoice
from .loop import random_state_kept
from .modes import modes_kept
from .rng import seed_of


def batchnorms(*modules: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm inside, in order."""
    return [part for one in modules for part in one.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@contextlib.contextmanager
def reestimating(*modules: nn.Module) -> Iterator[None]:
    """Forwards inside give the BatchNorms of `modules` new statistics: plain means over the batches that pass.

    All parts are in training mode, dropout too: the statistics are those that training itself would have met, as in
    `torch.optim.swa_utils.update_bn`. Modes and momenta are put back afterwards.
    """
    norms = batchnorms(*modules)
    kept = [(part, part.momentum) for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # None: cumulative mean
    try:
        with modes_kept(*modules):
            for module in modules:
                module.train()
            yield
    finally:
        for part, momentum in kept:
            part.momentum = momentum


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> None:
    """Estimate the BatchNorm statistics of a plain network anew, in place, from batches (x, y).

    Dropout stays on, as in training, and is drawn from `seed`; the caller's random state does not change. A network without
    BatchNorm is left alone, and the batches are not read. Raises InvalidChoice if there is no batch.
    """
    if not batchnorms(model):
        return
    device = next(model.parameters()).device
    rows = iter(batches)
    first = next(rows, None)
    if first is None:
        raise InvalidChoice("BatchNorm statistics cannot be estimated from no data; give at least one batch.")
    with random_state_kept(device), reestimating(model):
        torch.manual_seed(seed_of(seed, "refresh"))
        for x, _ in itertools.chain([first], rows):
            _run(model, x.to(device))


def _run(model: nn.Module, x: Tensor) -> None:
    try:
        model(x)
    except ValueError as error:
        refuse_one_sample(
            error,
            f"BatchNorm statistics cannot be estimated from a batch of {len(x)}; give batches of at least 2 samples.",
        )
        raise


def refuse_one_sample(error: ValueError, sentence: str) -> None:
    """Raises InvalidChoice with this sentence if `error` is that of a BatchNorm in training that was given one sample."""
    if "more than 1 value per channel" in str(error):
        raise InvalidChoice(sentence) from error
