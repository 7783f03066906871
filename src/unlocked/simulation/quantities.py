"""Quantities as people write them: 16GiB, 1Gbit/s, 100us, 10T.

Sizes in bytes (B; kB, MB, GB, TB by thousands; KiB, MiB, GiB, TiB by 1024), rates in bytes per second (a size and /s; a bit is
an eighth of a byte), times in seconds (s, ms, us or µs, ns, min, h), speeds in operations per second (k, M, G, T, P, with or
without FLOPS).
"""

from __future__ import annotations

import math
import re

from ..errors import InvalidChoice

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|inf)\s*([^\s0-9]*)\s*")
_THOUSANDS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}


def size(text: str) -> int:
    """Bytes. Raises InvalidChoice."""
    return round(_scaled("size", text, _sizes(), "16GiB, 500MB"))


def rate(text: str) -> float:
    """Bytes per second. Raises InvalidChoice."""
    units = {f"{unit}{per}": factor for unit, factor in _sizes().items() for per in ("/s", "ps") if unit}
    return _scaled("bandwidth", text, units, "1Gbit/s, 100MB/s")


def duration(text: str) -> float:
    """Seconds. Raises InvalidChoice."""
    return _scaled("time", text, _TIMES, "100us, 2ms")


def speed(text: str) -> float:
    """Operations per second. Raises InvalidChoice."""
    units = {f"{prefix}{rest}": f for prefix, f in _THOUSANDS.items() for rest in ("", "FLOPS", "FLOP/s", "flops")}
    return _scaled("speed", text, units, "10T, 500GFLOPS")


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers between commas. Raises InvalidChoice."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidChoice(f"--{name} {text!r} is no row of numbers; write for example 1,1,0.5.") from None


def _sizes() -> dict[str, float]:
    units = {f"{prefix}{kind}": factor for prefix, factor in (_THOUSANDS | _BINARY).items() for kind in ("B", "bit")}
    return {"": 1.0} | {unit: factor / 8 if unit.endswith("bit") else factor for unit, factor in units.items()}


def _scaled(what: str, text: str, units: dict[str, float], examples: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2] not in units:
        raise InvalidChoice(f"{text!r} is no {what}; write a number with a unit, for example {examples}.")
    value = float(found[1]) * units[found[2]]
    if not (value > 0 or (what == "time" and value == 0)) or (math.isinf(value) and what != "bandwidth"):
        raise InvalidChoice(f"{text!r} is not possible; a {what} must be greater than 0.")
    return value
