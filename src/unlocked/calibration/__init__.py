"""`unlocked calibrate`: what this machine takes for the stages of a network, for messages and for everything else.

crew.py        the two processes that measure, pinned to a core each
stages.py      seconds of every kind of work of a chain's stages       stopwatch.py   a clock that other programs do not disturb
machine.py     operations and bytes per second of one core             links.py       messages and exchanges
measuring.py   all of it together, as the two processes do it

What comes out is a cost file (simulation/cost_file.py), from which the simulated world takes its seconds.
"""

from .crew import Member, run_crew
from .measuring import Calibration, Plan, calibrate, measured_costs
from .stages import costs_of_measured, measure_stages

__all__ = [
    "Calibration",
    "Member",
    "Plan",
    "calibrate",
    "costs_of_measured",
    "measure_stages",
    "measured_costs",
    "run_crew",
]
