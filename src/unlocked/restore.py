"""Turn a session's parts into plain values and back: methods, optimizers, schedules.

Only classes of this library and of torch.optim are ever looked up by name; anything else must be given again by the user.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import heads
from .consensus.base import OptimizerFactory, ScheduleFactory
from .errors import BadCheckpoint

_OPAQUE_SCHEDULES = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")


def describe_method(method: Any) -> dict[str, Any]:
    """A credit or consensus rule as {"name": …, "options": {…}}; an option only the user's code can make is "?"."""
    options = {}
    for field in dataclasses.fields(method):
        options[field.name] = _describe_option(getattr(method, field.name))
    return {"name": method.name, "options": options}


def is_described(method: Any, described: dict[str, Any]) -> bool:
    """Whether this is the rule that `describe_method` described; what only the user's code can make is believed to be."""
    return _comparable(describe_method(method)) == _comparable(described)


def _comparable(described: dict[str, Any]) -> dict[str, Any]:
    options = described["options"].items()
    return {
        "name": described["name"],
        **{key: "?" if isinstance(value, dict) and "?" in value else value for key, value in options},
    }


def in_words(method: Any) -> str:
    """The rule as a text that is the same on every process; what only the user's code can make is left open."""
    return str(_comparable(describe_method(method)))


def _describe_option(value: Any) -> Any:
    """Plain values as they are, the library's own heads by class and fields, anything else as "?"."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"row": [_describe_option(one) for one in value]}
    if isinstance(value, heads.HeadSpec):
        return {"head": type(value).__name__, "fields": dataclasses.asdict(value)}  # type: ignore[call-overload]
    return {"?": repr(value)}


def _restore_option(described: Any) -> Any:
    if isinstance(described, dict) and "row" in described:
        return tuple(_restore_option(one) for one in described["row"])
    if isinstance(described, dict):
        return getattr(heads, described["head"])(**described["fields"])
    return described


def restore_method(described: dict[str, Any], known: Sequence[type], argument: str) -> Any:
    """The rule that `describe_method` described. Raises BadCheckpoint if only the user's code can make it."""
    by_name = {kind.name: kind for kind in known}  # type: ignore[attr-defined]
    opaque = [name for name, value in described["options"].items() if isinstance(value, dict) and "?" in value]
    if described["name"] not in by_name or opaque:
        raise BadCheckpoint(
            f"The checkpoint's {argument} is {described['name']} with {opaque or 'a rule'} made by your own code; "
            f"give it again: Trainer.resume(path, {argument}=…)."
        )
    options = {name: _restore_option(value) for name, value in described["options"].items()}
    return by_name[described["name"]](**options)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and defaults of an optimizer."""
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "defaults": dict(optimizer.defaults),
        "groups": len(optimizer.param_groups),
    }


def restore_optimizer(described: dict[str, Any]) -> OptimizerFactory:
    """A factory for the optimizer described: one of torch.optim with one group of parameters."""
    module, _, name = described["class"].rpartition(".")
    if not module.startswith("torch.optim") or described["groups"] != 1:
        raise BadCheckpoint(
            f"The checkpoint's optimizer is {described['class']} with {described['groups']} groups of parameters; "
            "give it again: Trainer.resume(path, optimizer=…)."
        )
    kind = getattr(torch.optim, name)
    accepted = inspect.signature(kind).parameters
    options = {key: value for key, value in described["defaults"].items() if key in accepted}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters, **options)

    return make


def describe_schedule(scheduler: Any) -> str | None:
    """Class of a learning-rate schedule, or None."""
    if scheduler is None:
        return None
    return f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"


def restore_schedule(described: str | None) -> ScheduleFactory | None:
    """A factory for the schedule described; its numbers come with the state that is loaded afterwards."""
    if described is None:
        return None
    module, _, name = described.rpartition(".")
    if not module.startswith("torch.optim.lr_scheduler") or name in _OPAQUE_SCHEDULES:
        raise BadCheckpoint(
            f"The checkpoint's schedule is {described}, which its state alone does not describe; "
            "give it again: Trainer.resume(path, schedule=…)."
        )
    kind = getattr(torch.optim.lr_scheduler, name)

    def make(optimizer: torch.optim.Optimizer) -> Any:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # lets torch count the optimizer's steps
        scheduler = kind.__new__(kind)  # __init__ wants the numbers that load_state_dict is about to set
        scheduler.optimizer = optimizer
        return scheduler

    return make
