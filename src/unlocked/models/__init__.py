"""The model zoo: ordinary networks that can be cut into stages, built by name or by function.

`build("resnet18", input_shape=(3, 32, 32), classes=10)` and `resnet18((3, 32, 32), 10)` are the same. Each model
carries `model.recipe`; `from_recipe(model.recipe)` builds the same architecture with fresh weights (drawn from torch's
global generator, so `torch.manual_seed` decides them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import choose
from .encoder import encoder
from .perceptron import mlp
from .pieces import Layered, Piece, pieces_of
from .recipe import option_defaults, require
from .resnet import resnet18, resnet32, resnet34, resnet50, resnet110
from .revresnet import revresnet18, revresnet34, revresnet50
from .revtransformer import revgpt, revvit
from .small_cnn import cnn
from .transformer import gpt
from .vgg import vgg6a, vgg8b, vgg16a, vgg19a
from .vit import vit

__all__ = [
    "Layered",
    "Piece",
    "build",
    "cnn",
    "encoder",
    "from_recipe",
    "gpt",
    "mlp",
    "names",
    "options",
    "pieces_of",
    "resnet18",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet110",
    "revgpt",
    "revresnet18",
    "revresnet34",
    "revresnet50",
    "revvit",
    "vgg6a",
    "vgg8b",
    "vgg16a",
    "vgg19a",
    "vit",
]

_MODELS: dict[str, Callable[..., Layered]] = {
    "cnn": cnn,
    "gpt": gpt,
    "mlp": mlp,
    "resnet110": resnet110,
    "resnet18": resnet18,
    "resnet32": resnet32,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "revgpt": revgpt,
    "revresnet18": revresnet18,
    "revresnet34": revresnet34,
    "revresnet50": revresnet50,
    "revvit": revvit,
    "vgg16a": vgg16a,
    "vgg19a": vgg19a,
    "vgg6a": vgg6a,
    "vgg8b": vgg8b,
    "vit": vit,
}


TEXT = frozenset({"gpt", "revgpt"})
"""The models that take tokens; the others take images or vectors."""


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(_MODELS)


def options(name: str) -> dict[str, Any]:
    """The options of a model and their defaults. Raises InvalidChoice for an unknown name."""
    return option_defaults(_MODELS[choose("model", name, _MODELS)])


def build(name: str, *, input_shape: Sequence[int], classes: int, **options: Any) -> Layered:
    """The model called `name` for samples of `input_shape` (without the batch) and `classes` outputs.

    Raises InvalidChoice for an unknown name or option, a value of the wrong type or range, or an input it cannot take.
    """
    return _MODELS[choose("model", name, _MODELS)](input_shape, classes, **options)


def from_recipe(recipe: Mapping[str, Any]) -> Layered:
    """The architecture that `recipe` (a model's `recipe`, perhaps read back from JSON) describes, with new weights."""
    parts = {"name", "input_shape", "classes", "options"}
    require(
        set(recipe) - {"encoder"} == parts and recipe.get("encoder", True) is True,
        f"A model recipe has exactly the entries {', '.join(sorted(parts))}; given {', '.join(sorted(recipe))}. That of an "
        "encoder has 'encoder': true as well.",
    )
    model = build(recipe["name"], input_shape=recipe["input_shape"], classes=recipe["classes"], **recipe["options"])
    return encoder(model) if "encoder" in recipe else model
