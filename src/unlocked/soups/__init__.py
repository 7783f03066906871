"""Populations: what several networks of one architecture are worth, together and as one.

    members = trainer.members()                                     # or any networks of one architecture
    train, validation = ul.soups.hold_out(train)
    scores = ul.soups.evaluate_population(members, test, validation=validation, train=train)

See docs/soups.md for what each number means.
"""

from ..batchnorm import refresh_batchnorm
from .averaging import averaged
from .calibration_error import expected_calibration_error, optimal_temperature
from .cost import Cost, inference_cost
from .diversity import Distances, disagreement, distance_to_consensus
from .ensemble import Ensemble
from .greedy import GreedySoup, greedy_soup
from .heat_map import HeatMap, heat_map
from .making import Soups, hold_out, make_soups
from .population import PopulationScores, Scores, evaluate_population
from .repairing import Repair, repair
from .showing import as_rich

__all__ = [
    "Cost",
    "Distances",
    "Ensemble",
    "GreedySoup",
    "HeatMap",
    "PopulationScores",
    "Repair",
    "Scores",
    "Soups",
    "as_rich",
    "averaged",
    "disagreement",
    "distance_to_consensus",
    "evaluate_population",
    "expected_calibration_error",
    "greedy_soup",
    "heat_map",
    "hold_out",
    "inference_cost",
    "make_soups",
    "optimal_temperature",
    "refresh_batchnorm",
    "repair",
]
