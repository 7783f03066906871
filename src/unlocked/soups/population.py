"""All there is to say in numbers about a population of networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InvalidChoice
from ..losses import Loss
from .averaging import refuse_unlike
from .calibration_error import BINS, expected_calibration_error, optimal_temperature
from .cost import Cost, inference_cost
from .diversity import Distances, disagreement, distance_to_consensus, mean_over_pairs
from .ensemble import Ensemble, Mean, mean_prediction
from .making import SAMPLES, Soups, make_soups
from .predicting import Batches, Predictions, device_of, loss_and_accuracy, number_or_worst, predict


@dataclass(frozen=True)
class Scores:
    """Of one network (or ensemble) on the test data.

    accuracy: share in [0, 1]. ece: expected calibration error at temperature 1. temperature: the optimal one; calibrated_ece:
    the error at it. All four None where targets are no classes. cost: of one sample's inference.
    """

    loss: float
    accuracy: float | None
    ece: float | None
    temperature: float | None
    calibrated_ece: float | None
    cost: Cost


@dataclass(frozen=True)
class PopulationScores:
    """members and what is made of them, on the test data.

    names: of the members. best, worst: which members have the highest and the lowest test accuracy (the lowest and the highest
    loss, where targets are no classes); this describes the spread, nothing is chosen by it. mean_ece, mean_calibrated_ece: over
    the members. refreshed, repaired, greedy: None if not made. greedy_members: in the order in which they were taken.
    greedy_score, validation_scores: held-out accuracy of the greedy soup and of each member (or the loss with a minus).
    disagreement: N×N shares of test samples; mean_disagreement: over all pairs. distances: to consensus, of the parameters.
    notes: what to know when reading.
    """

    names: list[str]
    members: list[Scores]
    best: int
    worst: int
    ensemble: Scores
    averaged: Scores
    refreshed: Scores | None
    repaired: Scores | None
    greedy: Scores | None
    greedy_members: list[int] | None
    greedy_score: float | None
    validation_scores: list[float] | None
    mean_ece: float | None
    mean_calibrated_ece: float | None
    disagreement: list[list[float]] | None
    mean_disagreement: float | None
    distances: Distances
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return {**asdict(self), "distances": self.distances._asdict()}


def evaluate_population(
    models: Sequence[nn.Module],
    test: Any,
    *,
    validation: Any = None,
    train: Any = None,
    soups: Soups | None = None,
    names: Sequence[str] | None = None,
    refresh: bool = True,
    repair: bool = True,
    greedy: bool = True,
    samples: int = SAMPLES,
    ensemble: Mean = "probabilities",
    loss: Loss | None = None,
    bins: int = BINS,
    measure: bool = False,
    batch_size: int = 512,
) -> PopulationScores:
    """Score the members, their ensemble, their mean and the soups, on `test`.

    Args:
        models: networks of one architecture, e.g. `trainer.members()`.
        test, validation, train: `Data` (used unaugmented), a pair of tensors, a torch Dataset, or an iterable of batches.
            validation chooses the greedy soup and the temperatures; without it there is no greedy soup, and the temperatures
            are those of `test`, as `notes` says. train gives the statistics for `refresh` and `repair`, from about `samples`.
        soups: the networks of `make_soups`, if they are there already.
        ensemble: mean of "probabilities", or of the "outputs" (always so where targets are no classes).
        loss: default cross-entropy, for targets that are no classes mean squared error.
        measure: time the inference as well.

    The outputs of all members on all data are kept, N times (samples × outputs) numbers. Nothing is chosen by `test`.
    Raises InvalidChoice for models of different architectures and for data that do not fit them.
    """
    refuse_unlike(models, names)
    options = {"refresh": refresh, "repair": repair, "greedy": greedy}
    if soups is None:
        soups = make_soups(
            models, validation=validation, train=train, samples=samples, loss=loss, batch_size=batch_size, **options
        )
    judged = _Judge(Batches(test, batch_size), validation, loss, bins, measure, batch_size)
    rows = [judged.predictions(model) for model in models]
    _refuse_other_order(rows)
    classes = rows[0].on_test.classes
    mean: Mean = ensemble if classes else "outputs"
    held_out = [row.on_validation for row in rows if row.on_validation is not None]
    whole = _Predicted(_together([row.on_test for row in rows], mean), _together(held_out, mean) if held_out else None)
    members = [judged.scores(model, row) for model, row in zip(models, rows)]
    ranks = [number_or_worst(-one.loss if one.accuracy is None else one.accuracy) for one in members]
    matrix = disagreement([row.on_test.outputs for row in rows]) if classes else None
    chosen = soups.greedy
    return PopulationScores(
        names=list(names) if names is not None else [f"member {n}" for n in range(len(models))],
        members=members,
        best=max(range(len(ranks)), key=lambda n: ranks[n]),
        worst=min(range(len(ranks)), key=lambda n: ranks[n]),
        ensemble=judged.scores(Ensemble(models, mean), whole),
        averaged=judged.of(soups.averaged),
        refreshed=None if soups.refreshed is None else judged.of(soups.refreshed),
        repaired=None if soups.repaired is None else judged.of(soups.repaired.model),
        greedy=None if chosen is None else judged.of(chosen.model),
        greedy_members=None if chosen is None else list(chosen.members),
        greedy_score=None if chosen is None else chosen.score,
        validation_scores=None if chosen is None else list(chosen.alone),
        mean_ece=_mean([one.ece for one in members]),
        mean_calibrated_ece=_mean([one.calibrated_ece for one in members]),
        disagreement=None if matrix is None else matrix.tolist(),
        mean_disagreement=None if matrix is None else mean_over_pairs(matrix),
        distances=distance_to_consensus(models),
        notes=_notes(classes, mean, validation is not None, train is not None, soups, options),
    )


class _Predicted(NamedTuple):
    on_test: Predictions
    on_validation: Predictions | None


def _refuse_other_order(rows: Sequence[_Predicted]) -> None:
    """Raises InvalidChoice if the members have not answered on the same samples in the same order."""
    for found in ([row.on_test for row in rows], [row.on_validation for row in rows if row.on_validation is not None]):
        if any(not torch.allclose(one.targets, found[0].targets, rtol=0, atol=0, equal_nan=True) for one in found[1:]):
            raise InvalidChoice(
                "The samples come in another order whenever the data are read (a DataLoader with shuffle=True?), so the "
                "members' answers cannot be put together; give shuffle=False, the .dataset, or a list of batches."
            )


def _together(rows: Sequence[Predictions], mean: Mean) -> Predictions:
    """The ensemble's predictions."""
    return Predictions(mean_prediction([row.outputs for row in rows], mean), rows[0].targets)


class _Judge:
    """Scores networks on the same data."""

    def __init__(
        self, test: Batches, validation: Any, loss: Loss | None, bins: int, measure: bool, batch_size: int
    ) -> None:
        self._test, self._loss, self._bins, self._measure = test, loss, bins, measure
        self._validation = None if validation is None else Batches(validation, batch_size)
        self._example = next(iter(test))[0]

    def predictions(self, model: nn.Module) -> _Predicted:
        held_out = None if self._validation is None else predict(model, self._validation)
        return _Predicted(predict(model, self._test), held_out)

    def of(self, model: nn.Module) -> Scores:
        return self.scores(model, self.predictions(model))

    def scores(self, model: nn.Module, found: _Predicted) -> Scores:
        loss, accuracy = loss_and_accuracy(found.on_test, self._loss)
        cost = inference_cost(model, self._example.to(device_of(model)), self._measure)
        if accuracy is None:
            return Scores(loss, None, None, None, None, cost)
        temperature = optimal_temperature(*(found.on_validation or found.on_test))
        ece, calibrated = (
            expected_calibration_error(*found.on_test, temperature=heat, bins=self._bins) for heat in (1.0, temperature)
        )
        return Scores(loss, accuracy, ece, temperature, calibrated, cost)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _notes(
    classes: bool, mean: Mean, validation: bool, train: bool, soups: Soups, wanted: dict[str, bool]
) -> list[str]:
    notes = []
    if not classes:
        notes.append("The targets are no classes: losses only, and the ensemble is the mean of the outputs.")
    else:
        notes.append(f"The ensemble is the mean of the members' {mean}.")
        if not validation:
            notes.append("Without validation data the optimal temperatures are those of the test data.")
    if wanted["greedy"] and soups.greedy is None and not validation:
        notes.append("Without validation data there is no greedy soup: it is not chosen by the test data.")
    if (wanted["refresh"] or wanted["repair"]) and not train and soups.repaired is None and soups.refreshed is None:
        notes.append("Without training data no statistics are estimated: neither refreshed nor repaired networks.")
    if soups.repaired is not None and soups.repaired.left_out:
        left = ", ".join(f"{name} ({reason})" for name, reason in soups.repaired.left_out.items())
        notes.append(f"REPAIR leaves out: {left}.")
    if soups.repaired is not None and soups.repaired.scaled:
        notes.append(f"REPAIR only scales, as they have no bias: {', '.join(soups.repaired.scaled)}.")
    return notes
