"""What `explain` (representation.py) finds out about a network, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .recipe import Recipe

KEPT = 256  # singular values that are written down


@dataclass(frozen=True)
class Reading:
    """One stage: its own head's held-out loss and accuracy, and whose loss it learns from. None: there is none.

    cosine: of its weights' gradient to backpropagation's; activation_cosine: of its output's. Of a network that learned from
    pairs of views the loss is of held-out pairs (held_out_pairs.py), and there is neither an accuracy nor a cosine.
    """

    stage: int
    loss: float | None
    accuracy: float | None
    learns_from: list[int]
    cosine: float | None
    activation_cosine: float | None


@dataclass(frozen=True)
class Depth:
    """The features at one depth. features: entries of a row; probe: accuracy, or R² of values; ridge: the λ chosen; spectrum:
    singular values of the centred features over the largest one, the first KEPT of them, whose squares are the covariance's;
    stages: those that stand there; knn, recipe: accuracies of the neighbours' vote and of a layer trained by the recipe, if
    asked for."""

    depth: int
    features: int
    probe: float | None
    ridge: float
    effective_rank: float
    participation_ratio: float
    spectrum: list[float]
    stages: list[Reading]
    knn: float | None = None
    recipe: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A network, depth by depth.

    classes: whether the targets are classes; rows: held-out labels; pool: as given; updates: made so far, if known; pairs:
    whether the network learned from pairs of views; knn: neighbours asked, recipe: how a layer was trained, if at all.
    """

    classes: bool
    rows: int
    pool: int
    updates: int | None
    depths: list[Depth]
    pairs: bool = False
    knn: int | None = None
    recipe: Recipe | None = None

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary: the content of RUN/probes.json."""
        return asdict(self)

    def plot(self, path: str | Path, name: str = "network") -> Path:
        """Draw the figure into a .png or .svg; several networks in one: `draw`. Raises InvalidChoice."""
        return draw({name: self}, path)


def draw(explanations: dict[str, Explanation], path: str | Path) -> Path:
    """One figure of several networks in a .png or .svg: panels by depth, a line for each, and spectra. Raises InvalidChoice."""
    from ..report.representation import draw_records  # it brings matplotlib with it

    return draw_records({name: [one.to_json()] for name, one in explanations.items()}, Path(path))
