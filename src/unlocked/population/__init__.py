"""Populations of networks whose members differ: by regularisers of their own, by their first weights.

ul.Trainer(chain, replicas=5, regularisers=ul.population.draw(5, seed=0), …)
ul.Trainer(chain, replicas=5, initial="different", …)
"""

from .applying import apply, check_unmixed, checked, classes_for
from .initial import Drawing, Initial, check_initial, in_words
from .regulariser import CIFAR, IMAGENET, Regulariser, Setting, draw, of_setting

__all__ = [
    "CIFAR",
    "IMAGENET",
    "Drawing",
    "Initial",
    "Regulariser",
    "Setting",
    "apply",
    "check_initial",
    "check_unmixed",
    "checked",
    "classes_for",
    "draw",
    "in_words",
    "of_setting",
]
