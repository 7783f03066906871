"""A network without its classifier: what self-supervised learning trains, and what a linear probe reads.

network = classifier ∘ encoder          encoder: x → features (B, D), pooled over space as the classifier pools them

classifier of the network                       in its place
linear layer (nn.Linear)                        nothing
mean over pixels, linear layer                  mean over pixels
LayerNorm, mean over tokens, linear layer       LayerNorm, mean over tokens
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import InvalidChoice
from .blocks import PooledClassifier
from .pieces import Layered
from .vit import MeanClassifier

M = TypeVar("M", bound=nn.Module)


class MeanOverPixels(nn.Module):
    """(B, C, H, W) → (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean of each channel."""
        return x.mean((2, 3))


class NormalisedMean(nn.Module):
    """LayerNorm, mean over the tokens: (B, t, D) → (B, D)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) → (B, D)."""
        return self.norm(x).mean(1)


def encoder(model: M) -> M:
    """`model` without its classifier, (B, *input_shape) → (B, D). It shares the other weights with `model`, under their names.

    `model`: of `ul.models` (not for text), or an nn.Sequential that ends in an nn.Linear; it is left as it is. What comes out
    has a `recipe` from which `from_recipe` builds an encoder, if `model` has one. Raises InvalidChoice for a model that does
    not end in a classifier, and for an encoder.
    """
    recipe: dict[str, Any] | None = getattr(model, "recipe", None)
    if recipe is not None and recipe.get("encoder"):
        raise InvalidChoice(f"This {recipe['name']} is an encoder already; its last layers give features.")
    found = _without_classifier(model)
    if found is None:
        raise InvalidChoice(
            f"{type(model).__name__} does not end in a classifier that could be taken off; give an nn.Sequential that ends in "
            "an nn.Linear, an image model of ul.models, or a network that gives features (B, D) from the beginning."
        )
    if recipe is not None:
        found.recipe = {**recipe, "encoder": True}  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def _without_classifier(module: nn.Module) -> nn.Module | None:
    """A module like this one whose last part is no classifier; None if it has none there."""
    if isinstance(module, PooledClassifier):
        return MeanOverPixels()
    if isinstance(module, MeanClassifier):
        return NormalisedMean(module.norm)
    if type(module) is nn.Linear:
        return nn.Identity()
    in_order = isinstance(module, Layered) or type(module).forward is nn.Sequential.forward
    names = [name for name, child in module._modules.items() if child is not None]
    if not in_order or not names:
        return None
    last = _without_classifier(module._modules[names[-1]])  # type: ignore[arg-type]
    if last is None:
        return None
    changed = copy.copy(module)
    changed._modules = {**module._modules, names[-1]: last}
    return changed
