"""The local loss of InfoPro: Wang et al., Revisiting Locally Supervised Learning (2021); Patel's thesis §2.8.

    ℓ^j = λ1_j · BCE(σ(reconstruction), x̂) + λ2_j · task

    x̂      the network's input, each channel brought to [0, 1] by its least and greatest value in the micro-batch
    BCE    −[x̂ log p + (1 − x̂) log(1 − p)], mean over all entries; σ the logistic function
    task   "softmax": cross-entropy of class scores with the classes
           "contrast": supervised contrast (Khosla et al. 2020) of L2-normalised embeddings z, one view of each sample:

               −(1/|A|) Σ_{i∈A} (1/|P_i|) Σ_{p∈P_i} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) )

           P_i the other samples of the batch of i's class, A the samples with such a one. If no sample has one, it is 0.

Images that were normalised per channel are exactly their pixels again, if the micro-batch has a black and a white pixel in
every channel, and stretched a little if not. A channel without contrast is 0 everywhere. Vectors have a channel for every
entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InvalidChoice, choose
from .losses import WrongTarget, cross_entropy

TASKS = ("contrast", "softmax")

# stages: (λ1, λ2) at the first local stage, (λ1, λ2) at the last one; the paper's for ResNet-110 on CIFAR-10
PRESETS: dict[int, tuple[float, float, float, float]] = {
    2: (5.0, 0.5, 5.0, 0.5),
    4: (1.0, 0.0, 0.0, 1.0),
    8: (5.0, 0.0, 0.0, 1.0),
    16: (5.0, 0.0, 0.5, 1.0),
}


def preset(stages: int) -> tuple[float, float, float, float]:
    """The paper's (λ1, λ2) at the first and (λ1, λ2) at the last local stage, for the least published number of stages that
    is not below `stages` (above 16: for 16)."""
    return PRESETS[next((known for known in PRESETS if stages <= known), 16)]


def weights_at(given: Sequence[float | None], share: float, stages: int) -> tuple[float, float]:
    """(λ1_j, λ2_j), linear from the first local stage (`share` 0) to the last local one (`share` 1).

    `given`: (λ1, λ2) at the first, (λ1, λ2) at the last. None at the last: as at the first, if that is given. None: the
    paper's for this number of stages. Raises InvalidChoice if one is negative or not finite.
    """
    for value in given:
        if value is not None and not 0 <= value < math.inf:
            raise InvalidChoice(f"InfoPro weighs its two terms by λ1 and λ2; {value} is not a number of at least 0.")
    paper = preset(stages)
    first = [one if one is not None else known for one, known in zip(given[:2], paper[:2])]
    backup = [known if one is None else one for one, known in zip(given[:2], paper[2:])]
    last = [one if one is not None else other for one, other in zip(given[2:], backup)]
    lambda1, lambda2 = ((1 - share) * a + share * b for a, b in zip(first, last))
    return lambda1, lambda2


@dataclass(frozen=True)
class InfoProLoss:
    """λ1 · BCE + λ2 · task on the output (what the task judges, reconstruction) of the InfoPro head; see above.

    Soft targets go with "softmax" only. Raises WrongTarget, InvalidChoice (options).
    """

    lambda1: float
    lambda2: float
    task: str = "softmax"
    temperature: float = 0.07

    reads_input: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("task", self.task, TASKS)
        if not self.temperature > 0:
            raise InvalidChoice(f"The contrast's temperature must be greater than 0; given {self.temperature}.")

    @property
    def classifies(self) -> bool:
        """Whether the task judges scores of classes; an embedding has no accuracy."""
        return self.task == "softmax"

    def __call__(self, output: Any, y: Tensor, x: Tensor) -> Tensor:
        if not (isinstance(output, tuple) and len(output) == 2):
            raise WrongTarget(
                f"InfoPro's loss needs the pair (task, reconstruction) of the 'infopro' head, got {type(output).__name__}; "
                "use cross_entropy for any other head."
            )
        read, reconstruction = output
        task = cross_entropy(read, y) if self.classifies else supervised_contrast(read, y, self.temperature)
        loss = self.lambda2 * task
        if reconstruction is None:  # λ1 = 0
            return loss
        target = to_unit_interval(x)
        wide = torch.promote_types(target.dtype, reconstruction.dtype)  # pixels have more digits than bfloat16
        return self.lambda1 * F.binary_cross_entropy_with_logits(reconstruction.to(wide), target.to(wide)) + loss


def to_unit_interval(x: Tensor) -> Tensor:
    """(B, C, …) with each channel's least value at 0 and greatest at 1; a channel of one value is 0."""
    others = [axis for axis in range(x.dim()) if axis != 1]
    low, high = x.amin(others, keepdim=True), x.amax(others, keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def supervised_contrast(embeddings: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The contrast above, of embeddings (B, D) of any length and classes y (B,), int64. Raises WrongTarget."""
    if y.dtype != torch.int64 or embeddings.dim() != 2 or y.shape != embeddings.shape[:1]:
        raise WrongTarget(
            f"Supervised contrast compares the classes of samples: it needs embeddings (B, D) and classes (B,) of int64, got "
            f"{tuple(embeddings.shape)} and {y.dtype} of shape {tuple(y.shape)}; with soft targets (mixup, cutmix, label "
            'smoothing) use task="softmax".'
        )
    if len(y) == 1:
        return embeddings.sum() * 0.0  # nothing to compare with, but a gradient all the same: zero
    with torch.autocast(embeddings.device.type, enabled=False):  # 1/τ makes bfloat16's few digits fewer
        z = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
        products = z @ z.T
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    similar = (products / temperature).masked_fill(itself, -math.inf)
    positive = (y[:, None] == y[None, :]) & ~itself
    chances = torch.where(positive, similar - similar.logsumexp(1, keepdim=True), 0.0).sum(1)
    partners = positive.sum(1)
    anchors = (partners > 0).sum().clamp_min(1)
    return -(chances / partners.clamp_min(1)).sum() / anchors
