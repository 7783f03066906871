"""Losses of networks and of their auxiliary heads: (output, target) -> scalar mean.

Legend: B samples, T positions, K classes, V vocabulary, D features, sg[.] stop-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidChoice, UnlockedError, choose

Loss = Callable[[Any, Tensor], Tensor]

EPSILON = 1e-8  # keeps the similarity of an all-zero row finite


class WrongTarget(UnlockedError, ValueError):
    """An output and a target that do not fit together; the sentence gives both shapes."""


def reads_input(loss: Loss) -> bool:
    """Whether a loss is also given the network's input: loss(output, y, x). It says so by `reads_input = True`."""
    return bool(getattr(loss, "reads_input", False))


def classifies(loss: Loss) -> bool:
    """Whether what the loss judges are scores of classes: not if it says `classifies = False`, nor if it compares numbers."""
    return bool(getattr(loss, "classifies", not is_regression(loss)))


def logits(output: Any) -> Tensor:
    """The logits of a head's output: the output itself, or its first entry if it is a tuple."""
    return output[0] if isinstance(output, tuple) else output


def cross_entropy(output: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, K) with classes y (B,), or of (B, T, V) with y (B, T); y is int64.

    Soft targets are probabilities of a float type, of the logits' own shape: −Σ_k y_k log p_k, mean over B (and T).
    Only shapes and types are checked, so nothing waits for a GPU. Raises WrongTarget.
    """
    _is_tensor("cross_entropy", output)
    if y.is_floating_point() and y.shape == output.shape and output.dim() in (2, 3):
        wide = torch.promote_types(output.dtype, y.dtype)
        return F.cross_entropy(output.flatten(0, -2).to(wide), y.flatten(0, -2).to(wide))
    if y.dtype != torch.int64:
        raise WrongTarget(
            f"cross_entropy needs class indices of type int64, or probabilities of the logits' shape {tuple(output.shape)}; "
            f"got {y.dtype} of shape {tuple(y.shape)}. Convert classes with y.long()."
        )
    if output.dim() not in (2, 3) or output.shape[:-1] != y.shape:
        raise WrongTarget(
            f"cross_entropy got logits of shape {tuple(output.shape)} and targets of shape {tuple(y.shape)}; allowed "
            "are (B, K) with (B,) and (B, T, V) with (B, T): classes come last in the logits, and not in the targets."
        )
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def mean_squared_error(output: Any, y: Tensor) -> Tensor:
    """Mean over all entries of (output - y)²; both of one shape, because broadcasting would hide a mistake.

    Raises WrongTarget.
    """
    _is_tensor("mean_squared_error", output)
    if output.shape != y.shape:
        raise WrongTarget(
            f"mean_squared_error got an output of shape {tuple(output.shape)} and a target of shape "
            f"{tuple(y.shape)}; both must be equal, so reshape one of them."
        )
    return (output - y).square().mean()


_REGRESSIONS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def is_regression(loss: Any) -> bool:
    """Whether the loss is known to compare numbers with numbers: mean_squared_error, and PyTorch's own of that sort."""
    functions = (mean_squared_error, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
    return isinstance(loss, _REGRESSIONS) or any(loss is known for known in functions)


def similarity(features_BD: Tensor) -> Tensor:
    """Cosine similarity (B, B) of the rows of (B, D), each row minus its mean, clamped to [-1, 1].

    S_ij = <r_i, r_j>, r_i = (x_i - mean x_i) / (1e-8 + ||x_i - mean x_i||)   (Nøkland & Eidnes 2019)
    """
    centred = features_BD - features_BD.mean(1, keepdim=True)
    rows = centred / (EPSILON + centred.norm(dim=1, keepdim=True))
    return (rows @ rows.T).clamp(-1, 1)


def label_similarity(y_B: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """similarity(onehot(y)) (B, B) without the one-hot matrix, which a vocabulary would make large.

    A centred one-hot row has squared length (K-1)/K; two different ones have inner product -1/K.
    """
    same = (classes - 1) / classes
    scale = (EPSILON + same**0.5) ** -2
    different = -scale / classes if classes > 1 else 0.0
    equal = (y_B[:, None] == y_B[None, :]).to(dtype)
    return (equal * (same * scale - different) + different).clamp_(-1, 1)


@dataclass(frozen=True)
class PredSim:
    """Prediction and similarity-matching loss on the output (logits, features) of the predsim head.

        (1-β) CE(logits, y) + β mean_ij (S(features)_ij - sg[S(onehot y)]_ij)²

    Nøkland & Eidnes, Training neural networks with local error signals, 2019; Fournier's thesis B.2.2. The mean over
    the B² pairs stands for the squared Frobenius norm, as in the authors' code, so the loss does not grow with the
    batch. That code also multiplies the *last* stage's plain cross-entropy by (1-β); here it does not: with SGD this
    would only scale that stage's learning rate.

    beta: weight β of the similarity term, in [0, 1].
    statistic: what maps (B, C, H, W) are compared by. 'flatten': all C·H·W values. 'std': the C standard deviations
        over space, as in the authors' code; maps of one pixel have none, and are flattened.
    rows: for tokens (B, T, D) with y (B, T) each position is a row; at most this many, evenly spaced over B·T.

    Every label must be a class index: there are no ignored positions. Raises InvalidChoice (options), WrongTarget.
    """

    beta: float = 0.99
    statistic: str = "flatten"
    rows: int = 256

    def __post_init__(self) -> None:
        choose("statistic", self.statistic, ("flatten", "std"))
        if not 0 <= self.beta <= 1:
            raise InvalidChoice(f"PredSim weighs its two terms by 1-beta and beta; beta={self.beta} is not in [0, 1].")
        if self.rows < 2:
            raise InvalidChoice(f"PredSim compares pairs of rows; rows={self.rows} is fewer than 2.")

    def __call__(self, output: Any, y: Tensor) -> Tensor:
        if not (isinstance(output, tuple) and len(output) == 2):
            raise WrongTarget(
                f"PredSim needs the pair (logits, features) of the 'predsim' head, got {type(output).__name__}; "
                "use cross_entropy for any other head."
            )
        if y.is_floating_point():
            raise WrongTarget(
                "PredSim compares the classes of samples and needs them as int64, got soft targets of "
                f"{y.dtype}; leave out mixup, cutmix and label smoothing, or use another head or credit rule (dgl), as for "
                "regression."
            )
        predicted, features = output
        prediction = cross_entropy(predicted, y)
        rows, labels = self._rows(features, y)
        target = label_similarity(labels, predicted.shape[-1], rows.dtype)
        return (1 - self.beta) * prediction + self.beta * (similarity(rows) - target).square().mean()

    def _rows(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One row of features and one label for each thing compared."""
        if y.dim() == 2:
            rows, labels = features.flatten(0, 1), y.flatten()
            if len(labels) <= self.rows:
                return rows, labels
            kept = torch.arange(self.rows, device=y.device) * len(labels) // self.rows
            return rows[kept], labels[kept]
        has_space = features.dim() == 4 and features.shape[2] * features.shape[3] > 1
        if self.statistic == "std" and has_space:
            return features.flatten(2).std(2), y
        return features.flatten(1), y


def _is_tensor(loss: str, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise WrongTarget(
            f"{loss} needs one tensor, got {type(output).__name__}; take logits(output), or use the head's own loss."
        )
