"""Reading JSON that somebody may have damaged: every surprise becomes a sentence that names the file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from ..errors import BadData
from ..timeline import KINDS, Act, Timeline

LARGEST = 2**63  # of whole numbers in a record


class Record:
    """A JSON object and where it was read. Entries that are absent or null are None; wrong types raise BadData."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BadData(f"{where} holds {_kind(value)} where an object was expected; the file is damaged.")
        self.value: dict[str, Any] = value
        self.where = where

    def number(self, key: str) -> float | None:
        """A finite number; NaN and infinities count as absent, for no figure can show them."""
        return _number(self.value.get(key), key, self.where)

    def whole(self, key: str, default: int) -> int:
        """A number that counts something."""
        number = self.number(key)
        return default if number is None else int(number)

    def numbers(self, key: str) -> list[float | None]:
        """A list of numbers; empty if absent."""
        return [_number(entry, key, self.where) for entry in self.rows(key)]

    def text(self, key: str, default: str = "") -> str:
        """A string; numbers and lists are written out."""
        value = self.value.get(key)
        if value is None:
            return default
        return value if isinstance(value, str) else json.dumps(value)

    def rows(self, key: str) -> list[Any]:
        """A list of anything; empty if absent."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise BadData(f"{self.where} has {_kind(value)} as {key!r} where a list was expected; the file is damaged.")
        return value

    def part(self, key: str) -> Record | None:
        """An object inside this one."""
        value = self.value.get(key)
        return None if value is None else Record(value, f"{self.where}, {key!r}")


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is no such file. Raises BadData if it cannot be read."""
    text = _text(path)
    return None if text is None else _decode(text, str(path))


def read_lines(path: Path) -> tuple[list[Record], bool]:
    """The objects of a JSONL file, and whether its last line was cut off (a killed run). Raises BadData."""
    text = _text(path) or ""
    lines = text.split("\n")
    whole, rest = lines[:-1], lines[-1]
    records = [
        Record(_decode(line, f"{path}, line {number},"), f"{path}, line {number},")
        for number, line in enumerate(whole, start=1)
        if line.strip()
    ]
    return records, bool(rest.strip())


def read_timeline(rows: list[Any], where: str) -> Timeline:
    """The acts of a timeline. Raises BadData if an act is not one."""
    try:
        timeline = Timeline.from_json(rows)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadData(
            f"{where} holds a timeline with an act that cannot be read ({error}); record it again."
        ) from error
    for number, act in enumerate(timeline):
        if not _is_act(act):
            raise BadData(f"{where} holds a timeline whose act {number} is no act: {tuple(act)}; record it again.")
    return timeline


def _is_act(act: Act) -> bool:
    whole = (act.replica, act.stage, act.micro_batch, act.version, act.bytes, act.wire, *(act.peer or ()))
    times = (act.start, act.end)
    return (
        isinstance(act.kind, str)
        and len(act.kind) == 1
        and act.kind in KINDS
        and all(isinstance(x, int) and abs(x) < LARGEST for x in whole)
        and all(isinstance(x, (int, float)) and abs(x) < 1e12 for x in times)  # NaN compares false
        and act.end >= act.start
        and isinstance(act.channel, str)
        and (act.peer is None or len(act.peer) == 2)
    )


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path} cannot be read ({error}); restore it, or run the training again.") from error


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where} is not valid JSON ({error}); restore the file, or run the training again.") from error


def _number(value: Any, key: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadData(f"{where} has {_kind(value)} as {key!r} where a number was expected; the file is damaged.")
    if abs(value) > sys.float_info.max:  # an infinity, or a whole number no float can hold
        return None
    return float(value) if math.isfinite(value) else None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number")
