"""What several processes say, as one reads it: rank 0 as it is, the others with their rank, nothing twice.

Rank 0's output passes at once. Lines of the others go to standard error as `[rank 2] …` after three seconds; till then it
may turn out that rank 0 says the same (then the line is left out) or that several do (then once, `[ranks 1, 2] …`).
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

HOLD = 3.0  # seconds in which others may say the same; processes start that far apart on a busy machine
_MANY = 10_000  # different lines; then those said before are forgotten
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)(: .*)?")


@dataclass
class _Held:
    """A line that waits. `ranks` is empty for a sentence of the supervisor; `reason` is the part of it that is news."""

    line: str
    time: int  # how often its speakers had said it before
    due: float
    ranks: list[int]
    reason: str = ""


class Voices:
    """The output of one attempt. `as_json`: errors are lines of JSON on standard output."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._unfinished: dict[tuple[int, str], str] = defaultdict(str)
        self._said: dict[int, Counter[str]] = defaultdict(Counter)  # by each rank
        self._printed: Counter[str] = Counter()
        self._errors: list[str] = []  # sentences that rank 0 or the supervisor has printed
        self._held: list[_Held] = []
        self._last: dict[int, str] = {}

    def hear(self, rank: int, stream: str, text: str, now: float) -> None:
        """Take a piece of output of a rank; `stream` is "stdout" or "stderr"."""
        if rank == 0:
            _write(stream, text)
        text = (self._unfinished[rank, stream] + text).replace("\r\n", "\n")
        *lines, self._unfinished[rank, stream] = re.split(r"[\n\r]", text)
        for line in lines:
            self._line(rank, line, now)

    def ended(self, rank: int, now: float) -> None:
        """A rank has ended; what it began to say is a line."""
        for (speaker, _), rest in list(self._unfinished.items()):
            if speaker == rank and rest:
                self._line(rank, rest, now)
        self._unfinished = defaultdict(str, {key: rest for key, rest in self._unfinished.items() if key[0] != rank})

    def reason(self, rank: int) -> str | None:
        """Why a rank says it failed: its last error sentence or exception."""
        return self._last.get(rank)

    def has_spoken(self, rank: int) -> bool:
        """Whether a rank has said anything that was read here."""
        return bool(self._said[rank])

    def announce(self, sentence: str, reason: str | None, now: float) -> None:
        """The supervisor's own error; left out if rank 0 has said it, or the `reason` in it, by then."""
        line = json.dumps({"event": "error", "message": sentence}) if self._as_json else f"error: {sentence}"
        self._held.append(_Held(line, 0, now + HOLD, [], reason or ""))

    @property
    def due(self) -> float | None:
        """When the next line shall be printed."""
        return min((held.due for held in self._held), default=None)

    def speak(self, now: float) -> None:
        """Print what is due."""
        for held in [held for held in self._held if held.due <= now]:
            if not self._is_old(held):
                self._print(held)
            self._held.remove(held)

    def finish(self) -> None:
        """Print all that waits."""
        self.speak(float("inf"))

    def _line(self, rank: int, line: str, now: float) -> None:
        sentence = sentence_of(line)
        if sentence is not None or _EXCEPTION.fullmatch(line):
            self._last[rank] = sentence or line
        if len(self._said[rank]) > _MANY:
            self._said[rank].clear()
        time = self._said[rank][line]
        self._said[rank][line] += 1
        if rank == 0:
            self._note(line, time)
        elif line.strip():
            self._hold(line, time, rank, now)

    def _hold(self, line: str, time: int, rank: int, now: float) -> None:
        for held in self._held:
            if (held.line, held.time) == (line, time) and held.ranks:
                held.ranks.append(rank)
                return
        self._held.append(_Held(line, time, now + HOLD, [rank]))

    def _is_old(self, held: _Held) -> bool:
        if self._printed[held.line] > held.time:
            return True
        sentence = sentence_of(held.line)
        if sentence is None:
            return False
        waiting = [sentence_of(other.line) or "" for other in self._held if other.line != held.line]
        if any(sentence in other for other in self._errors + ([] if not held.ranks else waiting)):
            return True
        return bool(held.reason) and any(held.reason in other for other in self._errors)

    def _print(self, held: _Held) -> None:
        names = ", ".join(map(str, sorted(held.ranks)))
        prefix = f"[rank{'s' if len(held.ranks) > 1 else ''} {names}] " if held.ranks else ""
        stream = "stdout" if self._as_json and not held.ranks else "stderr"
        _write(stream, f"{prefix}{held.line}\n")
        self._note(held.line, held.time, heard=not held.ranks)

    def _note(self, line: str, time: int, heard: bool = True) -> None:
        if len(self._printed) > _MANY:
            self._printed.clear()
        self._printed[line] = max(self._printed[line], time + 1)
        if heard and (sentence := sentence_of(line)) is not None:
            self._errors = [*self._errors[-20:], sentence]


def sentence_of(line: str) -> str | None:
    """The sentence in a line `error: …` or `{"event": "error", "message": …}`; None for any other line."""
    if line.startswith("error: "):
        return line.removeprefix("error: ")
    if line.startswith('{"event": "error"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(line).get("message", ""))
    return None


def tell(as_json: bool, event: str, sentence: str) -> None:
    """A sentence of the supervisor that is no error."""
    _write(
        "stdout" if as_json else "stderr",
        f"{json.dumps({'event': event, 'message': sentence})}\n" if as_json else f"{sentence}\n",
    )


def _write(stream: str, text: str) -> None:
    file = sys.stdout if stream == "stdout" else sys.stderr
    with contextlib.suppress(OSError, ValueError):  # whoever read our output has gone; the children are not to blame
        file.write(text)
        file.flush()
