"""Which method on which hardware: every pair of rules on a simulated cluster, sorted.

    plan = ul.plan(model, like=x, batch=256, devices=8, memory="16GiB", bandwidth="1Gbit/s", latency="100us")
    plan.headline, plan.best, plan.table()

cuts.py cuts the network on shapes alone, candidates.py says what is tried, predicting.py simulates one candidate, accuracy.py
is what is known about the results, planner.py puts the plan together, wording.py puts it into words.
"""

from .accuracy import ACCURACY, Accuracy
from .cuts import Cuts
from .planner import Objective, Plan, plan
from .predicting import Infeasible, Row

__all__ = ["ACCURACY", "Accuracy", "Cuts", "Infeasible", "Objective", "Plan", "Row", "plan"]
