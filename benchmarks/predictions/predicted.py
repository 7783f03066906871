"""What the simulated world says about the same methods, from the calibration alone."""

from __future__ import annotations

from typing import Any

from unlocked import simulation as sim
from unlocked.chain import Chain
from unlocked.simulation.memory import activation_curves
from unlocked.timeline import BUSY, Timeline

from .methods import Method


def predict(
    method: Method, costs: sim.Costs, hardware: sim.Hardware, chain: Chain, samples: int, steps: int
) -> dict[str, Any]:
    """Seconds of a step in a window of so many, from standstill to standstill, and the bytes each worker keeps."""
    timeline = sim.simulate(
        method.credit,
        method.consensus,
        costs=costs,
        replicas=method.replicas,
        steps=steps,
        samples=samples,
        hardware=hardware,
        chain=chain,
    )
    computed = Timeline(act for act in timeline if act.kind in BUSY)
    curves = activation_curves(computed, costs, samples // method.credit.parts)
    saved = {f"{r}.{j}": max(size for _, size in curve) for (r, j), curve in curves.items()}
    return {"seconds": timeline.span() / steps, "saved": saved}
