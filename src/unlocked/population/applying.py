"""A member's regulariser on one batch.

Order: erasing, then smoothing, then mixup or CutMix, so erased boxes are mixed like the rest of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..chain import Chain
from ..costs import run_once
from ..errors import InvalidChoice
from ..losses import WrongTarget, logits
from .erasing import erase
from .mixing import cutmix, mixup
from .regulariser import Regulariser


def apply(
    regulariser: Regulariser, x: Tensor, y: Tensor, classes: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The batch as the member is to see it, on the batch's own device.

    x: (B, …); images (B, C, H, W), normalised, for CutMix and erasing. y: classes (B,), or (B, T) for smoothing alone; int64.
    classes: K, the width of the network's output; only needed where targets become soft.
    generator: on the CPU; what is drawn from it is the same for every device.

    Returns x, and y as it was, or as probabilities (B, K) or (B, T, K) with smoothing, mixup or CutMix. The tensors given are
    never changed; a regulariser that does nothing returns them. Raises InvalidChoice (samples that do not suit the
    regulariser), WrongTarget (targets that do not).
    """
    check_samples(regulariser, x)
    _check_targets(regulariser, y)
    if regulariser.random_erasing:
        x = erase(x, regulariser.random_erasing, generator)
    if not regulariser.softens:
        return x, y
    soft = smoothed(y, classes or 0, regulariser.label_smoothing, _type_of(x))
    if not regulariser.mixes:
        return x, soft
    if _cuts(regulariser, generator):
        return cutmix(x, soft, regulariser.cutmix, generator)
    return mixup(x, soft, regulariser.mixup, generator)


def smoothed(y: Tensor, classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """(1 − s) onehot(y) + s/K: (B, K) of classes (B,), or (B, T, K) of (B, T). Raises WrongTarget."""
    if y.device.type == "cpu" and bool(((y < 0) | (y >= classes)).any()):
        raise WrongTarget(
            f"There is a label {int(y.min()) if y.min() < 0 else int(y.max())}, but the network has {classes} outputs; labels "
            f"of a regularised member are whole numbers from 0 to {classes - 1}."
        )
    rest = smoothing / classes
    soft = torch.full((*y.shape, classes), rest, dtype=dtype, device=y.device)
    return soft.scatter_(-1, y[..., None], 1 - smoothing + rest)


def check_samples(regulariser: Regulariser, x: Tensor) -> None:
    """Raises InvalidChoice for samples that the regulariser cannot be used on."""
    shape = tuple(x.shape)
    if regulariser.mixes and not x.is_floating_point():
        raise InvalidChoice(
            f"mixup and cutmix mix samples of a float type, got {x.dtype} of shape {shape}; for tokens only label_smoothing is "
            "possible."
        )
    for name in ("cutmix", "random_erasing"):
        if getattr(regulariser, name) and (x.dim() != 4 or not x.is_floating_point()):
            raise InvalidChoice(
                f"{name} needs normalised images (B, C, H, W) of a float type, got {x.dtype} of shape {shape}; leave it out "
                "for other samples."
            )


def _check_targets(regulariser: Regulariser, y: Tensor) -> None:
    if regulariser == Regulariser():
        return
    shape = tuple(y.shape)
    if y.dtype != torch.int64:
        raise WrongTarget(
            f"Regularisers are for classes of type int64, got targets of {y.dtype} and shape {shape}; for regression leave "
            "them out, or convert labels with y.long()."
        )
    if y.dim() != 1 and (regulariser.mixes or y.dim() != 2):
        raise WrongTarget(
            f"mixup and cutmix mix targets (B,), one class for a sample, got shape {shape}; for one class per token (B, T) "
            "only label_smoothing is possible."
        )


def _cuts(regulariser: Regulariser, generator: torch.Generator) -> bool:
    """Whether this batch is for CutMix: with both, one of two."""
    if regulariser.mixup and regulariser.cutmix:
        return bool(torch.rand((), generator=generator) < 0.5)
    return regulariser.cutmix > 0


def _type_of(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


# ---- a trainer's ----------------------------------------------------------------------------------------------------


def checked(regularisers: Sequence[Regulariser] | None, replicas: int) -> tuple[Regulariser, ...] | None:
    """The regularisers given to a trainer, one for each replica. Raises InvalidChoice."""
    if regularisers is None:
        return None
    if isinstance(regularisers, Regulariser) or not all(isinstance(one, Regulariser) for one in regularisers):
        raise InvalidChoice(
            f"regularisers must be a row of ul.population.Regulariser, one for each of the {replicas} replicas, got "
            f"{regularisers!r}; draw them with ul.population.draw({replicas}, seed)."
        )
    if len(regularisers) != replicas:
        raise InvalidChoice(
            f"{len(regularisers)} regularisers were given for {replicas} replicas; give one for each, "
            f"ul.population.draw({replicas}, seed)."
        )
    return tuple(regularisers)


def check_unmixed(self_supervised: bool, regularisers: Sequence[Regulariser] | None) -> None:
    """Raises InvalidChoice where a rule that compares views of an image would get views mixed with other images, or mixed
    labels. Erasing is fine: it changes each view for itself."""
    if self_supervised and any(one.softens for one in regularisers or ()):
        raise InvalidChoice(
            "A self-supervised rule compares two views of one image, but mixup and cutmix mix images of the batch, and label "
            "smoothing changes labels it has no use for; leave them out (population='homogeneous')."
        )


def classes_for(regularisers: Sequence[Regulariser] | None, chain: Chain) -> int | None:
    """The width of the network's output, if some member's targets become soft. Raises InvalidChoice.

    It is read off the chain's example: neither labels nor a data set need be known.
    """
    if regularisers is None or regularisers == (Regulariser(),) * len(regularisers):
        return None
    if chain.like is not None:
        for one in regularisers:
            check_samples(one, chain.like)
    if not any(one.softens for one in regularisers):
        return None
    if chain.like is None:
        raise InvalidChoice(
            "mixup, cutmix and label smoothing need to know how many classes there are, but this chain has no example batch to "
            "see it from; make it with Chain(stages, like=x) or ul.cut(model, stages, like=x)."
        )
    return int(logits(run_once(chain, chain.like)).shape[-1])
