"""Options of rules: whether a value is of the annotated type, from the command line or from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InvalidChoice, choose


def check_types(rule: Any) -> None:
    """Raises InvalidChoice for an option that is of none of its annotated types; words are for the rule itself to check, and
    a rule that is no dataclass has none."""
    hints = _hints(rule.__class__) if dataclasses.is_dataclass(rule) else {}
    for name, hint in hints.items():
        given = getattr(rule, name)
        flag = bool in _allowed(hint) and given in (0, 1)
        if not flag and not (isinstance(given, str) and _words(hint)):
            fit(f"{getattr(rule, 'name', rule.__class__.__name__)}'s {name}", given, hint)


class Typed:
    """A base of dataclasses that check their options in `__post_init__`: where that fails over an option's type, the sentence
    of `check_types` is raised."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @functools.wraps(own)
        def checked(rule: Any) -> None:
            try:
                own(rule)
            except (TypeError, AttributeError):
                check_types(rule)
                raise

        setattr(cls, "__post_init__", checked)  # noqa: B010  # mypy knows no assignment of a method


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of the options; none where a user's class has some that cannot be read here."""
    with contextlib.suppress(NameError):
        hints = get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def fit(what: str, given: Any, hint: Any) -> Any:
    """`given` as a value of the annotated type. Raises InvalidChoice."""
    allowed = _allowed(hint)
    for one in allowed:
        if _is_a(given, one):
            return float(given) if one is float else given
    if isinstance(given, str) and bool not in allowed and (words := _words(hint)):
        choose(f"value of {what}", given, words)
    raise InvalidChoice(f"{what} must be {' or '.join(map(_in_words, allowed))}; given {given!r}.")


def _allowed(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> list[str]:
    return [option for one in _allowed(hint) if get_origin(one) is Literal for option in get_args(one)]


def _is_a(given: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return given is None
    if get_origin(hint) is Literal:
        return given in get_args(hint)
    if hint in (int, float):  # NumPy's, too
        return isinstance(given, numbers.Integral if hint is int else numbers.Real) and not isinstance(given, bool)
    return isinstance(given, get_origin(hint) or hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a word", types.NoneType: "None"}
    return words.get(hint, str(hint))
