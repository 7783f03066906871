"""Checks of what a model is built from, and the recipe it carries: name, input shape, classes, every option.

A recipe is made of JSON's types only, so a checkpoint can hold it and rebuild the same architecture.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, get_type_hints

from ..errors import InvalidChoice, choose
from .pieces import Layered

P = ParamSpec("P")
M = TypeVar("M", bound=Layered)

_FIXED = ("input_shape", "classes")


def with_recipe(make: Callable[P, M]) -> Callable[P, M]:
    """Let a constructor check its arguments against its annotations, and its model carry `model.recipe`.

    The recipe holds every option, defaults too, so it means the same model after a default has changed.
    Raises InvalidChoice for an unknown option or a value of the wrong type.
    """
    name = make.__name__
    signature, hints = inspect.signature(make), get_type_hints(make)

    @functools.wraps(make)
    def built(*args: P.args, **kwargs: P.kwargs) -> M:
        for key in kwargs:
            choose(f"option of {name}", key, signature.parameters)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {key: _typed(name, key, value, hints[key]) for key, value in bound.arguments.items()}
        model = make(**values)  # type: ignore[call-arg]
        options = {key: value for key, value in values.items() if key not in _FIXED}
        model.recipe = {
            "name": name,
            "input_shape": list(values["input_shape"]),
            "classes": values["classes"],
            "options": options,
        }
        return model

    return built


def option_defaults(make: Callable[..., Layered]) -> dict[str, Any]:
    """The options of a constructor with their defaults, without `input_shape` and `classes`."""
    parameters = inspect.signature(make).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _FIXED}


def require(condition: bool, sentence: str) -> None:
    """Raise InvalidChoice with this sentence unless the condition holds."""
    if not condition:
        raise InvalidChoice(sentence)


def require_image(name: str, shape: Sequence[int], smallest: int) -> None:
    """Refuse an input shape that is not (channels, height, width) with both sides at least `smallest` pixels."""
    require(
        len(shape) == 3,
        f"{name} takes images, input_shape (channels, height, width); given {tuple(shape)}. "
        "Use gpt for text and mlp for plain vectors.",
    )
    require(
        min(shape[1:]) >= smallest,
        f"{name} needs images of at least {smallest}×{smallest} pixels, because it makes them smaller on the way; "
        f"given {shape[1]}×{shape[2]}. Use larger images or a model for small ones, such as cnn.",
    )


def require_positive(name: str, **values: float) -> None:
    """Refuse an option that is zero or negative."""
    for key, value in values.items():
        require(value > 0, f"{name}'s option {key!r} must be greater than 0; given {value}.")


def require_probability(name: str, key: str, value: float) -> None:
    """Refuse a dropout probability outside [0, 1)."""
    require(0 <= value < 1, f"{name}'s option {key!r} is a probability of at least 0 and below 1; given {value}.")


def _typed(name: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or InvalidChoice; a whole number is a fine `float`, a bool is no number."""
    if key == "input_shape":
        return _shape(name, value)
    number = not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number and isinstance(value, numbers.Integral):
        require(key != "classes" or int(value) >= 1, f"{name} needs at least 1 class; given {value}.")
        return int(value)
    if hint is float and number and isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a word"}
    raise InvalidChoice(f"{name}'s {key!r} must be {words[hint]}; given {value!r}.")


def _shape(name: str, value: Any) -> tuple[int, ...]:
    require(
        isinstance(value, Sequence) and len(value) > 0 and all(map(_is_size, value)),
        f"{name}'s 'input_shape' must be a sequence of whole numbers of at least 1, one sample's shape without "
        f"the batch, such as (3, 32, 32); given {value!r}.",
    )
    return tuple(int(size) for size in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
