"""Which methods go together when gradients are delayed, and how what is in flight is saved and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .chain import Stage
from .consensus.base import Consensus, Weights
from .credit.base import Credit
from .credit.delayed import Delayed
from .credit.delayed_gradients import DelayedGradients
from .credit.pipedream_2bw import PipeDream2BW
from .errors import BadCheckpoint, InvalidChoice
from .flight import Flight, InFlight
from .mitigation import ALL, Mitigation, WeightPrediction


def check_delays(credit: Credit, consensus: Consensus, precision: str, mitigation: Mitigation | None) -> None:
    """Raises InvalidChoice for what does not go together under delayed gradients."""
    if mitigation is not None and not isinstance(mitigation, Mitigation):
        raise InvalidChoice(
            f"mitigation must be one of ul.mitigation ({', '.join(kind.__name__ for kind in ALL)}) or None, got "
            f"{type(mitigation).__name__}."
        )
    if not isinstance(credit, Delayed):
        return
    if consensus.needs_processes:
        raise InvalidChoice(
            f"{credit.name} has several forwards in flight, which PyTorch's own data parallelism ({consensus.name}) does not "
            "allow; use all-reduce."
        )
    if isinstance(credit, DelayedGradients) and credit.keep == "graph" and precision == "bf16":
        raise InvalidChoice(
            "In bf16 a graph keeps casts of the weights it was made with, so delayed-gradients would not see today's weights; "
            "use keep='input', another rule (pipedream), or precision='float32'."
        )
    if isinstance(credit, PipeDream2BW) and isinstance(mitigation, WeightPrediction):
        raise InvalidChoice(
            "pipedream-2bw computes with the weights of the step before, by its rule; weight-prediction would replace them. "
            "Use pipedream with weight-prediction, or another mitigation."
        )


def state_in_flight(weights: Weights) -> dict[str, Any]:
    """What a worker carries from one step to the next, as numbers and tensors. Messages must have been collected before."""
    flight: Flight | None = weights.flight
    state = {
        "queue": [] if flight is None else [entry.state() for entry in flight.queue],
        "received": [] if flight is None else [list(messages) for messages in flight.received],
        "standing": None if flight is None else flight.standing,
        "versions": {str(version): row for version, row in weights.versions.kept.items()},
        "pending": weights.pending,
        "gradients": [x.grad for x in weights.parameters] if weights.pending else [],
        "mitigation": None if weights.mitigating is None else weights.mitigating.state(),
    }
    return torch.utils._pytree.tree_map_only(torch.Tensor, _laid_out, state)


def load_in_flight(credit: Credit, stage: Stage, weights: Weights, state: Mapping[str, Any], same: bool) -> None:
    """The inverse; weights and version are in place. Raises BadCheckpoint if the stage does not make the same graph again."""
    state = _put_back(state, weights.worker.device or torch.device("cpu"))
    weights.pending = state["pending"]
    for x, gradient in zip(weights.parameters, state["gradients"]):
        x.grad = gradient
    if weights.mitigating is not None and state["mitigation"] is not None:
        weights.mitigating.load(state["mitigation"])
    if not state["queue"] and state["standing"] is None:
        return
    if not isinstance(credit, Delayed) or not same:
        carried = (
            f"{len(state['queue'])} micro-batches in flight" if state["queue"] else "weights that its next step reads"
        )
        raise BadCheckpoint(
            f"The checkpoint has {carried}, which only the rule it was saved under can go on with; resume without credit= "
            f"(got {credit!r})" + (", or drain before saving." if state["queue"] else ".")
        )
    _refill(credit, stage, weights, state)


def _refill(credit: Delayed, stage: Stage, weights: Weights, state: Mapping[str, Any]) -> None:
    worker, versions = weights.worker, weights.versions
    flight = credit.flight(weights)
    versions.kept = {int(version): row for version, row in state["versions"].items()}
    flight.received.extend(tuple(messages) for messages in state["received"])
    flight.standing = state["standing"]
    if flight.standing is not None:
        versions.hold(flight.standing)
    for saved in state["queue"]:
        entry = InFlight.of(saved)
        versions.hold(entry.reading.version)
        flight.queue.append(entry)
        try:
            credit.revive(worker, stage, weights, entry, saved["graph"])
        except (IndexError, RuntimeError) as error:
            raise BadCheckpoint(
                f"Stage {worker.stage} does not make the graph again that the checkpoint has of micro-batch {entry.number} "
                f"({error}); resume with the same network and version of PyTorch."
            ) from error


def _laid_out(x: torch.Tensor) -> dict[str, Any]:
    """A tensor and the order of its dimensions in memory, which a file does not keep and which may decide a last bit."""
    order = sorted(range(x.dim()), key=lambda dimension: x.stride(dimension), reverse=True)
    return {"order": order, "values": x.detach().permute(order)}


def _put_back(value: Any, device: torch.device) -> Any:
    """The inverse, on the device, in memory of its own (a file's begins anywhere)."""
    if isinstance(value, Mapping):
        if value.keys() == {"order", "values"}:
            inverse = sorted(range(len(value["order"])), key=value["order"].__getitem__)
            return value["values"].to(device, copy=True).permute(inverse)
        return {key: _put_back(part, device) for key, part in value.items()}
    return [_put_back(part, device) for part in value] if isinstance(value, list) else value
