"""Bytes kept for backwards by every worker in process while the pipeline is full, and bytes of copies of its older weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unlocked as ul
from unlocked import worker
from unlocked.chain import Chain
from unlocked.consensus.base import Weights
from unlocked.probes.memory import SavedBytes
from unlocked.worker import Place

METHODS: dict[str, Any] = {
    "backprop": ul.credit.Backprop(),
    "checkpoint": ul.credit.Backprop(),
    "pipedream": ul.credit.PipeDream(),
    **{
        f"petra {keep}": ul.credit.PETRA(keep=keep)
        for keep in ("graph", "input+weights", "input", "weights", "nothing")
    },
}


class Checkpointed(nn.Module):
    """A body under torch.utils.checkpoint. The reentrant kind: the meter sees what its second run keeps, too."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.needed = torch.zeros((), requires_grad=True)  # so that it differentiates although data need no gradient

    def forward(self, x: Tensor) -> Tensor:
        """The body's output; only x is kept."""
        return checkpoint(lambda x, needed: self.body(x), x, self.needed, use_reentrant=True)


def measured(method: str, chain: Chain, x: Tensor, y: Tensor) -> tuple[list[int], list[int], int]:
    """(saved, copies, at once): bytes of each stage at the peak of each; and saved by all stages at their common peak.

    So many steps that the pipeline is full and every version of the weights in it is another one.
    """
    if method == "checkpoint":
        for stage in list(chain)[:-1]:
            stage.body = Checkpointed(stage.body)
    trainer = ul.Trainer(chain, credit=METHODS[method], optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-4))
    copies: dict[Place, _Copies] = {weights.worker.place: _Copies(weights) for weights in trainer.weights}
    fixed = [*chain.parameters(), *chain.buffers(), *(m.needed for m in chain.modules() if isinstance(m, Checkpointed))]
    hop = getattr(METHODS[method], "hop", 0)
    with _Saved(fixed, copies) as meter:
        for _ in range(2 * hop * (len(chain) - 1) + 3):
            trainer.step(x.clone(), y)  # as from a loader: each batch has memory of its own
        saved, at_once = dict(meter.workers), meter.peak
    return [saved[place] for place in copies], [row.peak for row in copies.values()], at_once


class _Copies:
    """The copies of a worker's weights, looked at after every update: they are made there, and dropped before the next."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._update = weights, weights.update
        self.peak = 0
        self.storages: set[int] = set()
        weights.update = self._watched  # type: ignore[method-assign]

    def _watched(self) -> None:
        self._update()
        versions = self._weights.versions
        self.peak = max(self.peak, versions.copies)
        self.storages = {x.untyped_storage()._cdata for row in versions.kept.values() for x in row}


class _Saved(SavedBytes):
    """Leaves out copies of weights, too: a forward run again with older weights saves them, but they are there anyway."""

    def __init__(self, ignore: list[Tensor], copies: dict[Place, _Copies]) -> None:
        super().__init__(ignore)
        self._copies = copies

    def count(self, tensor: Tensor, holder: object) -> bool:
        """As of any tensor, unless it is (a part of) a copy."""
        here = worker.computing
        if here is not None and tensor.untyped_storage()._cdata in self._copies[here].storages:
            return False
        return super().count(tensor, holder)
