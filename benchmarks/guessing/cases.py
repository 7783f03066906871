"""Which pairs of target and guess are trained, in which order, and at which learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

SPACES = ("weight", "activity")
HEADS = ("mlp", "cnn", "linear")
RANDOM = ("gaussian", "rademacher")
WIDTHS = (0.5, 2.0, 4.0)  # of the thesis' Table 4.9, as factors of --width; 4 with --full only


class Case(NamedTuple):
    """One row of the table.

    stages: 8 (a residual block each) or 16 (a convolution each, no shortcuts). target: "end to end" is backpropagation.
    guess: "itself" is the target as its own guess, local learning. head, space: "" where there is none.
    variant: "" | "stage scalar" (Eq. 4.4 to the letter) | "subspace" (Table 4.6). width: a factor of --width.
    """

    stages: int
    target: str
    guess: str = ""
    head: str = ""
    space: str = ""
    variant: str = ""
    width: float = 1.0

    @property
    def label(self) -> str:
        """As in a table, without the number of stages."""
        if self.target == "end to end":
            words = [self.target]
        elif self.guess == "itself":
            words = ["local learning", self.head]
        else:
            words = [f"{self.guess} → {self.target}", self.head, self.space, self.variant]
        if self.width != 1:
            words.append(f"width × {self.width:g}")
        return ", ".join(word for word in words if word)


def cases(full: bool = False) -> list[Case]:
    """Every row once, the ones that most orderings need first."""
    rows = [row for tier in (_first, _second, _third) for row in tier(full)]
    return list(dict.fromkeys(rows))


def _first(full: bool) -> Iterator[Case]:
    yield Case(8, "end to end")
    for stages in (8, 16):
        for space in SPACES:
            yield Case(stages, "global", "local", "mlp", space)
            yield Case(stages, "global", "gaussian", "", space)
        if stages == 8:
            for space in SPACES:
                yield Case(8, "global", "ntk", "mlp", space)
            yield Case(8, "local", "itself", "mlp")
    for space in SPACES:
        yield Case(8, "global", "local", "linear", space)
        yield Case(8, "local", "gaussian", "mlp", space)
    yield Case(8, "global", "local", "linear", "activity", "subspace")
    for space in SPACES:
        yield Case(8, "intermediate", "local", "mlp", space)


def _second(full: bool) -> Iterator[Case]:
    stages = 16 if full else 8  # a short training of 16 stages without shortcuts is too close to chance
    for width in WIDTHS if full else WIDTHS[:2]:
        yield Case(stages, "global", "local", "mlp", "weight", width=width)
        for space in SPACES:
            yield Case(stages, "global", "gaussian", "", space, width=width)
    yield Case(16, "end to end")
    for space in SPACES:
        yield Case(8, "global", "local", "cnn", space)
    yield Case(8, "global", "local", "mlp", "activity", "subspace")
    for space in SPACES:
        yield Case(16, "global", "ntk", "mlp", space)
    yield Case(16, "local", "itself", "mlp")
    for head in ("linear", "cnn"):
        for space in SPACES:
            yield Case(16, "global", "local", head, space)


def _third(full: bool) -> Iterator[Case]:
    yield Case(8, "local", "itself", "linear")
    yield Case(8, "local", "itself", "cnn")
    yield Case(8, "intermediate", "gaussian", "mlp", "weight")
    yield Case(8, "global", "local", "mlp", "weight", "stage scalar")
    for space in SPACES:
        yield Case(8, "global", "rademacher", "", space)
        yield Case(8, "global", "fixed-ntk", "mlp", space)
        yield Case(8, "global", "local", "predsim", space)
    yield Case(8, "local", "itself", "predsim")
    if full:
        yield from _whole_tables()


def _whole_tables() -> Iterator[Case]:
    """What is left of Tables 4.2 to 4.6 and of B.3 to B.5."""
    for stages in (8, 16):
        for head in HEADS:
            yield Case(stages, "local", "itself", head)
            yield Case(stages, "global", "local", head, "activity", "subspace")
            for space in SPACES:
                for guess in ("local", "ntk", "fixed-ntk"):
                    yield Case(stages, "global", guess, head, space)
                yield Case(stages, "intermediate", "local", head, space)
                yield Case(stages, "intermediate", "ntk", head, space)
                for guess in RANDOM:
                    yield Case(stages, "local", guess, head, space)
                    yield Case(stages, "intermediate", guess, head, space)
        for space in SPACES:
            for guess in RANDOM:
                yield Case(stages, "global", guess, "", space)
            yield Case(stages, "global", "local", "predsim", space)
        yield Case(stages, "local", "itself", "predsim")


WATCHED = (
    *(Case(8, "global", guess, "mlp", space) for guess in ("local", "ntk") for space in SPACES),
    *(Case(8, "global", "gaussian", "", space) for space in SPACES),
    *(Case(16, "global", "local", "mlp", space) for space in SPACES),
)  # of the first seed the cosine of guess and target is noted, and heads are trained that nothing needs

GRID = (0.01, 0.05, 0.2)
# For a few hundred updates 0.05, the thesis' rate of local guesses, is by --grid also the best of random ones and of NTK, ...
SHORT = 0.05
SHORT_NTK_ACTIVITY = 0.2  # ... but not in activity space


def rate(case: Case, rates: str) -> float:
    """The learning rate: of "thesis" (F B.1.3), or for a "short" training, where the grid's best is another one."""
    kind = "random" if case.guess in RANDOM else "ntk" if "ntk" in case.guess else "other"
    if rates == "short":
        return SHORT_NTK_ACTIVITY if case.space == "activity" and kind == "ntk" else SHORT
    if kind == "random":
        return 0.01 if case.space == "activity" and case.target == "global" else 0.005
    if case.stages == 16 and (case.guess, case.head, case.space) == ("local", "linear", "activity"):
        return 0.005
    return 0.01 if kind == "ntk" and case.stages == 16 else 0.05


def grid() -> list[Case]:
    """What the learning rates of a short training are chosen by."""
    pairs = (("gaussian", ""), ("ntk", "mlp"), ("local", "mlp"))
    rows = [Case(8, "global", guess, head, space) for guess, head in pairs for space in SPACES]
    return [*rows, Case(8, "local", "itself", "mlp"), Case(8, "end to end")]


def credit_options(case: Case) -> dict[str, Any]:
    """Of ForwardGradient, but for its head."""
    chosen: dict[str, Any] = {"guess": case.guess, "target": case.target, "space": case.space, "mode": "two-backward"}
    if case.variant == "subspace":
        chosen["subspace"] = True
    if case.variant == "stage scalar":
        chosen["scalars"] = "stage"
    return chosen
