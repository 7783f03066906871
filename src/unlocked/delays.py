"""Which methods go together when gradients are delayed, and how what is in flight is saved and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .chain import Stage
from .consensus.base import Consensus, Weights
from .credit.base import Credit
from .credit.delayed import Delayed
from .credit.keeping import KeepGraph
from .errors import BadCheckpoint, InvalidChoice
from .flight import Flight, InFlight
from .mitigation import ALL, Mitigation


def check_delays(credit: Credit, consensus: Consensus, precision: str, mitigation: Mitigation | None) -> None:
    """Raises InvalidChoice for what does not go together under delayed gradients."""
    if mitigation is not None and not isinstance(mitigation, Mitigation):
        raise InvalidChoice(
            f"mitigation must be one of ul.mitigation ({', '.join(kind.__name__ for kind in ALL)}) or None, got "
            f"{type(mitigation).__name__}."
        )
    if not isinstance(credit, Delayed):
        return
    if consensus.one_at_a_time:
        raise InvalidChoice(
            f"{credit.name} has several micro-batches in flight, but under {consensus.name} a replica has one at a time; use "
            "another consensus rule (all-reduce), or a credit rule without delay. Cyclic data parallelism as a pipeline is the "
            "credit rule cdp-pipeline."
        )
    if consensus.needs_processes:
        raise InvalidChoice(
            f"{credit.name} has several forwards in flight, which PyTorch's own data parallelism ({consensus.name}) does not "
            "allow; use all-reduce."
        )
    keeping = credit.keeping
    if isinstance(keeping, KeepGraph) and keeping.semantics == "current" and precision == "bf16":
        raise InvalidChoice(
            f"In bf16 a graph keeps casts of the weights it was made with, so {credit.name} would not see today's weights; "
            "use keep='input', another rule (pipedream), or precision='float32'."
        )
    if mitigation is not None and mitigation.predicts and not credit.sees_newest:
        raise InvalidChoice(
            f"{credit.name} computes with the weights of the step before, by its rule; {mitigation.name} would replace them. "
            f"Use pipedream with {mitigation.name}, or another mitigation."
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
        "buffer": None if weights.buffer is None else weights.buffer.state(),
    }
    return laid_out(state)


def load_in_flight(credit: Credit, stage: Stage, weights: Weights, state: Mapping[str, Any], same: bool) -> None:
    """The inverse; weights and version are in place. Raises BadCheckpoint if the stage does not make the same graph again."""
    state = put_back(state, weights.worker.device)
    weights.pending = state["pending"]
    for x, gradient in zip(weights.parameters, state["gradients"]):
        x.grad = gradient
    if weights.mitigating is not None and state["mitigation"] is not None:
        weights.mitigating.load(state["mitigation"])
    if credit.buffers and state.get("buffer") is not None:  # under a rule without buffers they are let go
        credit.buffered(weights).load(state["buffer"])
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
    if flight.standing is not None and credit.stands(worker, weights.store.accumulate):
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


def laid_out(state: Any) -> Any:
    """The state with its tensors and how they lie in memory."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, _laid_out, state)


def put_back(state: Any, device: torch.device | None) -> Any:
    """The inverse, on the device, in memory of its own (a file's begins anywhere)."""
    device = device or torch.device("cpu")
    if isinstance(state, Mapping):
        if state.keys() == {"order", "values"}:
            inverse = sorted(range(len(state["order"])), key=state["order"].__getitem__)
            return state["values"].to(device, copy=True).permute(inverse)
        return {key: put_back(part, device) for key, part in state.items()}
    return [put_back(part, device) for part in state] if isinstance(state, list) else state


def _laid_out(x: torch.Tensor) -> dict[str, Any]:
    """A tensor and the order of its dimensions in memory, which a file does not keep and which may decide a last bit."""
    order = sorted(range(x.dim()), key=lambda dimension: x.stride(dimension), reverse=True)
    return {"order": order, "values": x.detach().permute(order)}
