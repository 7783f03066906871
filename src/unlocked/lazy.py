"""Packages whose names are imported on first use, because what is behind them (torch, SciPy) takes a second of every start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package. homes: name → the package's module that defines it; "" where the name is a module.

    A name must not be that of another module of the package: once imported, the module would stand in its place.
    """

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = import_module(f".{homes[name] or name}", package)
        if homes[name]:
            value = getattr(value, name)
        setattr(sys.modules[package], name, value)
        return value

    return found
