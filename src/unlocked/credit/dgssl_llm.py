"""DGSSL with layerwise loss modification, DGSSL-LLM (P §4.2.2, Algorithms 5-7; §4.3.3).

    stage j of K learns from    positive pairs with S ≥ α_j, a share μ₊^(K−j) of them, the easiest
                                negative pairs with S ≤ β_j, a share μ₋^(K−j) of them, the easiest
    ℓ^j = 1/(2|kept|) Σ over kept positives of −log( exp(S(a, b) / τ) / Σ_{k≠a, S(a,k) ≤ β_j} exp(S(a, k) / τ) )

    S cosine similarity of the stage's own projections, μ sample ratios. Everything else is DGSSL (dgssl.py); pairs/easy.py has
    the loss.

The thesis reads the thresholds off the similarities that a trained SimCLR network, the oracle, gives to pairs, before
training: here to the pairs of at most 4 batches of 256 images, drawn from a seed of (run seed, "thresholds"), when `fit`
begins; a run that goes on finds the same ones. `thresholds="batch"` needs no oracle: each stage takes those shares of its own
pairs in every batch.

Limits: μ = 1 is DGSSL, bit for bit. The last stage has all pairs (with order="decreasing", the first one).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..data import Domains
from ..errors import InvalidChoice
from ..pairs import EasyNTXent, Judged, PairLoss, ratios, thresholds
from ..pairs.contrasting import cosines, judged_by, negatives, of_partners
from ..rng import seed_of
from .asking_oracle import AskingOracle
from .base import Properties
from .contrasting import Replicas
from .dgssl import local_properties
from .oracle import Oracle

if TYPE_CHECKING:
    from ..session import Trainer

BATCHES, IMAGES = 4, 256  # that thresholds are read off


def similarities(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the positive pairs (B,), and of the negative pairs, of projections (2B, E)."""
    square = cosines(rows)
    return of_partners(square)[::2], square[negatives(len(rows), rows.device)]


@dataclass(frozen=True)
class EasiestNTXent(PairLoss):
    """EasyNTXent with the thresholds that keep these shares of the positive and of the negative pairs of every batch.

    positives, negatives: shares in (0, 1]; by, temperature: as there. Raises what it raises.
    """

    positives: float
    negatives: float
    by: str = "stage"
    temperature: float = 0.5

    @property
    def reads_oracle(self) -> bool:
        return self.by == "oracle"

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        if self.by == "oracle":
            judged_by("EasiestNTXent", oracle, z)  # refuses what does not fit
        compared = z if oracle is None or self.by != "oracle" else oracle
        positive, negative = similarities(compared.detach())
        if bool((positive.sum() + negative.sum()).isnan()):  # it must show in the loss, where training looks for it
            return EasyNTXent(by=self.by, temperature=self.temperature).judge(z, y, oracle)
        alpha, beta = thresholds(positive, negative, self.positives, self.negatives if len(negative) else 1.0)
        return EasyNTXent(alpha, beta, self.by, self.temperature).judge(z, y, oracle)


@dataclass(frozen=True)
class _Unknown(PairLoss):
    """Before the rule has met the data."""

    by: str
    temperature: float
    known: ClassVar[bool] = False

    @property
    def reads_oracle(self) -> bool:
        return self.by == "oracle"

    def by_itself(self) -> PairLoss:
        return EasyNTXent(-1.0, 1.0, self.by, self.temperature).by_itself()

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        raise InvalidChoice(
            "dgssl-llm reads its thresholds off the training data, which it has not met: call fit, or before steps by hand "
            "trainer.credit.meet(trainer, data); or give thresholds=."
        )


@dataclass(frozen=True)
class DGSSLLLM(AskingOracle):
    """Every stage learns from the easiest pairs of views, the deeper it is, the more of them.

    Args:
        ratio: μ₊ in (0, 1]; the thesis has 0.81 to 0.97.
        ratio_negatives: μ₋; None: as μ₊.
        order: of difficulty with depth: "increasing" or "decreasing".
        positives_only: leave no negatives out.
        thresholds: "oracle", "batch", or (α, β): two rows with a number in [−1, 1] for each stage.
        oracle: the folder of a run of simclr, or a module x → projections (B, E); frozen. See oracle.py.
        by: whose similarities are compared with the thresholds: the stage's "own", as in Algorithm 5, or the "oracle"'s, as in
            §4.2.2's text. None: the oracle's, where the thresholds are read off them: early stages' own ones may be so much
            greater that no negative pair is left, and nothing is learned.
        temperature: τ.
        projector, dimension, replicas: as in DGSSL.
    """

    ratio: float = 0.95
    ratio_negatives: float | None = None
    order: Literal["increasing", "decreasing"] = "increasing"
    positives_only: bool = False
    thresholds: Any = "oracle"
    oracle: Any = None
    by: Literal["own", "oracle"] | None = None
    temperature: float = 0.5
    projector: Any = "1c2f"
    dimension: int = 128
    replicas: Replicas = "together"

    name: ClassVar[str] = "dgssl-llm"
    properties: ClassVar[Properties] = local_properties(
        "DGSSL with layerwise loss modification (Patel 2023)",
        "P §4.2.2, Algorithms 5-7",
        up="Ψ_A; by=oracle: and its projections",
        objective="local, over easy pairs of views; harder with depth",
    )
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        given = self.thresholds
        if given not in ("oracle", "batch") and not (
            isinstance(given, tuple) and len(given) == 2 and all(isinstance(row, tuple) and row for row in given)
        ):
            raise InvalidChoice(
                f"dgssl-llm's thresholds={given!r} is not possible; give 'oracle', 'batch', or two rows with a number for each "
                "stage, as in thresholds=((0.8,0.5,-1),(0.2,0.6,1))."
            )
        if isinstance(given, tuple) and len(given[0]) != len(given[1]):
            raise InvalidChoice(
                f"dgssl-llm's thresholds have {len(given[0])} numbers α and {len(given[1])} β; give one of each for each stage."
            )
        stages = len(given[0]) if isinstance(given, tuple) else 1
        for j in range(stages):
            self.loss_of(j, stages)  # checks the numbers
        self._shares(2)

    def _shares(self, stages: int) -> list[tuple[float, float]]:
        """Of positives and negatives, that each stage keeps."""
        negative = 1.0 if self.positives_only else self.ratio if self.ratio_negatives is None else self.ratio_negatives
        return list(zip(ratios(self.ratio, stages, self.order), ratios(negative, stages, self.order)))

    @property
    def _by(self) -> str:
        return "oracle" if self.compares_oracle else "stage"

    @property
    def compares_oracle(self) -> bool:
        """Whether it is the oracle's similarities that decide (`by`)."""
        return self.by == "oracle" or (self.by is None and self.thresholds == "oracle" and self.oracle is not None)

    def _easy(self, alpha: Any, beta: Any) -> EasyNTXent:
        return EasyNTXent(alpha, beta, self._by, self.temperature)

    def loss_of(self, stage: int, stages: int) -> PairLoss:
        if isinstance(self.thresholds, tuple):
            return self._easy(*self.thresholds).at(stage, stages)
        shares = self._shares(stages)[stage]
        if shares == (1.0, 1.0):
            return self._easy(-1.0, 1.0)
        if self.thresholds == "oracle":
            return _Unknown(self._by, self.temperature)
        return EasiestNTXent(*shares, self._by, self.temperature)

    # ---- the oracle ----------------------------------------------------------------------------------------------------

    @property
    def oracle_rows(self) -> Oracle | None:
        return self._oracle if self.compares_oracle else None

    def asks(self, stages: int) -> bool:
        return self.compares_oracle or self._reads_thresholds(stages)

    def _reads_thresholds(self, stages: int) -> bool:
        """Whether there are thresholds to be read off the oracle's similarities."""
        return self.thresholds == "oracle" and any(shares != (1.0, 1.0) for shares in self._shares(stages))

    def meet(self, trainer: Trainer, data: Any) -> None:
        super().meet(trainer, data)
        stages = trainer.stages
        if not self._reads_thresholds(stages):
            return
        seen = [similarities(self._oracle(x)) for x in _views(trainer, data)]
        positive, negative = (torch.cat(rows) for rows in zip(*seen))
        for j, shares in enumerate(self._shares(stages)):
            alpha, beta = thresholds(positive, negative, *shares)
            for chain in (*trainer.chains, trainer.template):  # of which new chains are made
                chain[j].loss = self._easy(alpha, beta)


def _views(trainer: Trainer, data: Any) -> Iterator[Tensor]:
    """Some batches of training views, the same whenever they are asked for."""
    size = min(IMAGES, len(data))
    when: dict[str, Any] = {"epoch": 0, "seed": seed_of(trainer.seed, "thresholds"), "device": trainer.device}
    batches = data.mixed(size, **when) if isinstance(data, Domains) else data.batches(size, **when)
    return (x for x, _ in itertools.islice(batches, BATCHES))
