"""InfoPro: Revisiting Locally Supervised Learning (Wang, Ni, Song, Yang & Huang, 2021; P §2.8; FACTS 1.4).

    ℓ^j = λ1_j · BCE(decoder^j(x^{j+1}), x^0) + λ2_j · task(head^j(x^{j+1}), y)

    j local stage, x^{j+1} its output, x^0 the network's input brought to [0, 1], BCE binary cross-entropy, λ linear in the
    depth from the first local stage to the last local one; task: cross-entropy, or supervised contrast of embeddings.
    Everything else is DGL; the last stage learns from the network's own loss. infopro_loss.py has the details.

A stage that must still tell the input keeps what its own task does not need yet and the stages above may. Each worker has the
network's input of its micro-batch at hand, so nothing more is sent than in DGL.

Limits: λ1 = 0, λ2 = 1 and task "softmax" is DGL with the '1c2f' head, bit for bit. J = 1 is backpropagation.

Differences: the paper adds all losses up and steps one optimizer; here each stage steps its own, which is the same, as no
gradient crosses a boundary. The paper cuts at published places (split_tables.py); `cut(…, balance="memory")` makes splits
like its memory-balanced ones. The decoder for ImageNet, which is larger, is not built in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..heads import HeadReport, InfoProHead
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads
from .dgl import local_step


@dataclass(frozen=True)
class InfoPro(SynchronousCredit):
    """Every stage learns to reconstruct the network's input and to solve the task.

    Args:
        task: "softmax" (cross-entropy) or "contrast" (supervised contrast; the better one in the paper).
        lambda1, lambda2: weights of reconstruction and task at the first local stage; lambda1_last, lambda2_last: at the last
            local one. None at the last: as at the first, if that is given. None: the paper's for this number of stages.
        temperature: τ of the contrast.
        budget: as in DGL. The paper's heads, and the decoder at the input's size, cost more than a tenth of most stages.
    """

    task: Literal["softmax", "contrast"] = "softmax"
    lambda1: float | None = None
    lambda2: float | None = None
    lambda1_last: float | None = None
    lambda2_last: float | None = None
    temperature: float = 0.07
    budget: float | None = None

    name: ClassVar[str] = "infopro"
    properties: ClassVar[Properties] = Properties(
        title="InfoPro (Wang et al. 2021)",
        source="P §2.8",
        locks="forward",
        memory="one stage, its head and decoder",
        up="Ψ_A",
        down="0",
        delay="0",
        objective="local, with reconstruction of the input",
    )
    grouped: ClassVar[bool] = True
    one_backward: ClassVar[bool] = True
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._head()  # checks the options

    def _head(self) -> InfoProHead:
        return InfoProHead(
            self.task, self.lambda1, self.lambda2, self.lambda1_last, self.lambda2_last, self.temperature
        )

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        return attach_heads(chain, self._head(), self.budget, seed, 0)

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        await local_step(worker, stage, batch, weights)
