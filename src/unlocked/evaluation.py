"""What a population is worth: single networks, their mean, their ensemble."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain
from .losses import logits
from .modes import modes_kept


@dataclass(frozen=True)
class Evaluation:
    """Scores on a data set. Accuracies are shares in [0, 1], None where the target is no class.

    loss, accuracy: of the network itself (one replica) or of the averaged network (several).
    stages: (loss, accuracy) read at each stage's head, None where there is none; the last entry is the network's own.
    members: accuracy of each replica. ensemble: accuracy of their mean prediction. Empty/None for one replica.
    """

    loss: float
    accuracy: float | None
    stages: list[tuple[float, float | None] | None]
    members: list[float | None]
    ensemble: float | None

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


@torch.no_grad()
def averaged(chains: Sequence[Chain]) -> Chain:
    """A new chain whose parameters, heads' too, and floating-point buffers are the means over the chains."""
    mean = copy.deepcopy(chains[0])
    if len(chains) == 1:
        return mean
    others = [[*chain.parameters(), *chain.buffers()] for chain in chains]
    for k, x in enumerate([*mean.parameters(), *mean.buffers()]):
        if x.is_floating_point():
            total = others[0][k].clone()
            for other in others[1:]:
                total += other[k]
            x.copy_(total.div_(len(chains)))
    return mean


@torch.no_grad()
def refresh_batchnorm(chain: Chain, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Re-estimate the BatchNorm statistics of the chain and its heads: plain means over the given batches."""
    norms = [part for part in chain.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [(part, part.momentum) for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # None: cumulative mean
    with modes_kept(chain):
        chain.train()
        for x, _ in batches:
            for stage in chain:
                x = stage(x)
                stage.read(x)
    for part, momentum in kept:
        part.momentum = momentum


@torch.no_grad()
def ensemble(chains: Sequence[Chain], x: Tensor) -> Tensor:
    """Mean over the chains of their predicted probabilities, softmax over the last dimension; shape of the logits."""
    with modes_kept(*chains):
        for chain in chains:
            chain.eval()
        return torch.stack([torch.softmax(logits(chain(x)), dim=-1) for chain in chains]).mean(0)


class Score:
    """Sums of losses and hits over batches, kept on the device."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._hits: Tensor | float = 0.0
        self._targets = 0
        self._samples = 0
        self._classes = True

    def add(self, output: Any, y: Tensor, loss: Tensor | None) -> None:
        """One batch: the head's output (or logits), its targets and the mean loss."""
        self._samples += len(y)
        if loss is not None:
            self._loss = self._loss + loss.detach() * len(y)
        self._classes = self._classes and not y.is_floating_point()
        if self._classes:
            self._targets += y.numel()
            self._hits = self._hits + (logits(output).argmax(-1) == y).sum()

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self._loss) / self._samples

    @property
    def accuracy(self) -> float | None:
        """Share of targets hit, or None if they are not classes."""
        return float(self._hits) / self._targets if self._classes else None


@torch.no_grad()
def evaluate(
    chains: Sequence[Chain],
    network: Chain,
    batches: Iterable[tuple[Tensor, Tensor]],
    depth: int | None = None,
) -> Evaluation:
    """Score `network` (at every head, and at stage `depth` as the network's own output) and, if several, the chains."""
    depth = len(network) - 1 if depth is None else depth
    population = list(chains) if len(chains) > 1 else []
    stages = [Score() if stage.head is not None or j == len(network) - 1 else None for j, stage in enumerate(network)]
    members, together = [Score() for _ in population], Score()
    with modes_kept(network, *population):
        for chain in [network, *population]:
            chain.eval()
        for x, y in batches:
            _score_stages(network, stages, x, y)
            if population:
                outputs = [logits(chain.read(x, depth)) for chain in population]
                for score, output in zip(members, outputs):
                    score.add(output, y, None)
                together.add(sum(torch.softmax(output, dim=-1) for output in outputs), y, None)
    own = stages[depth]
    assert own is not None
    return Evaluation(
        own.loss,
        own.accuracy,
        [None if score is None else (score.loss, score.accuracy) for score in stages],
        [score.accuracy for score in members],
        together.accuracy if population else None,
    )


def _score_stages(network: Chain, scores: Sequence[Score | None], x: Tensor, y: Tensor) -> None:
    for stage, score in zip(network, scores):
        x = stage(x)
        if score is not None:
            output = stage.read(x)
            score.add(output, y, stage.loss(output, y))
