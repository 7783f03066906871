"""What a method costs on some hardware: the cost model of the simulated world, and methods on clusters nobody has.

import unlocked as ul
from unlocked import simulation as sim

costs = sim.costs_of(sim.profile(chain), sim.Device(flops=1e12))
cluster = sim.Hardware(network=sim.uniform(latency=100e-6, bandwidth=125e6), speeds=(1, 1, 0.5))
timeline = sim.simulate(ul.credit.DGL(), costs=costs, samples=32, steps=10, hardware=cluster, chain=chain)
"""

from ..lazy import on_first_use
from .costs import Costs, StageCosts, costs_of, unit
from .hardware import Device, Hardware, SlowDowns
from .network import FREE, Edge, Line, Network, hierarchical, uniform
from .profile import Profile, StageProfile, profile

__all__ = [
    "FREE",
    "Costs",
    "Device",
    "Edge",
    "Hardware",
    "Line",
    "Network",
    "Profile",
    "SlowDowns",
    "StageCosts",
    "StageProfile",
    "costs_of",
    "hierarchical",
    "profile",
    "retimed",
    "simulate",
    "uniform",
    "unit",
]


# they need the simulated world, which needs this package
__getattr__ = on_first_use(__name__, {"retimed": "retiming", "simulate": "simulating"})
