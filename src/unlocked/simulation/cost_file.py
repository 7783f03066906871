"""Cost files: what `unlocked calibrate` has measured, as JSON that people can read.

    format, version     "unlocked costs", 1
    date, machine, versions, threads, links        where it was measured, and how
    device              flops, memory_bandwidth, memory
    network             latency, bandwidth, send, receive, exchange ([seconds, seconds per byte]), collective
    chain               null, or the measured stages: recipe, credit, heads, optimizer, samples, and for each stage its seconds
                        by kind of work ([seconds, seconds per sample]), the optimizer's bytes, shapes and bytes

A number that is infinite (a bandwidth that was not seen to limit anything) is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..chain import Chain
from ..errors import InvalidChoice, UnlockedError
from .costs import Costs, StageCosts
from .hardware import Device, Hardware
from .network import Edge, Line, Network
from .profile import Holding, StageProfile

FORMAT, VERSION = "unlocked costs", 1


def save(
    path: str | Path,
    hardware: Hardware,
    costs: Costs | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    chain: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a cost file, never half of one; returns its content.

    about: where and how it was measured. chain: what the costs are of (recipe, credit, …). Raises OSError.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        **(about or {}),
        "device": _device(hardware.device),
        "network": _network(hardware.network),
        "chain": None if costs is None else {**(chain or {}), "stages": [_stage(stage) for stage in costs.stages]},
    }
    file = Path(path)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    aside.replace(file)
    return content


def load(path: str | Path, chain: Chain | None = None) -> tuple[Hardware, Costs | None]:
    """The machine and, if a network was measured, its stages; both exactly as they were saved.

    chain: the network that is to be simulated. Raises InvalidChoice: no such file, not a cost file, of another version,
    damaged, or measured on another network, cut or heads.
    """
    content = read(path)
    try:
        hardware = Hardware(_read_device(content["device"]), network=_read_network(content["network"]))
        stages = None if content["chain"] is None else tuple(map(_read_stage, content["chain"]["stages"]))
    except (KeyError, TypeError, ValueError, AttributeError, UnlockedError) as error:
        raise InvalidChoice(
            f"{path} is damaged: {_told(error)}. Measure again with unlocked calibrate --out {path}."
        ) from error
    costs = None if stages is None else Costs(stages)
    if chain is not None and costs is not None:
        refuse_other_chain(path, costs, chain)
    return hardware, costs


def base_hardware(path: str | Path | None) -> Hardware:
    """The machine of a cost file, for options to change; the default one without a file. Raises InvalidChoice."""
    return Hardware() if path is None else load(path)[0]


def read(path: str | Path) -> dict[str, Any]:
    """The content of a cost file as it is. Raises InvalidChoice: no such file, no JSON, another format or version."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InvalidChoice(f"There is no cost file {path}; make one with unlocked calibrate --out {path}.") from None
    except OSError as error:
        raise InvalidChoice(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InvalidChoice(f"{path} is no cost file: it is not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidChoice(f"{path} is no cost file; give one that unlocked calibrate has written.")
    if content.get("version") != VERSION:
        raise InvalidChoice(
            f"{path} is a cost file of version {content.get('version')!r}; this library reads version {VERSION}. "
            f"Measure again with unlocked calibrate --out {path}."
        )
    return content


def refuse_other_chain(path: str | Path, costs: Costs, chain: Chain) -> None:
    """Raises InvalidChoice if the costs are not of this chain: other stages, other weights, other heads."""
    if len(costs) != len(chain):
        raise InvalidChoice(
            f"{path} was measured on {len(costs)} stage(s), but the network is cut into {len(chain)}; "
            "calibrate with the same --stages."
        )
    for j, stage in enumerate(chain):
        here = [(tuple(x.shape), x.dtype) for x in stage.parameters() if x.requires_grad]
        there = list(costs[j].profile.weights)
        if here != there:
            raise InvalidChoice(
                f"{path} was measured on another network: stage {j} has {len(there)} trained tensors "
                f"({_count(there):,} values) there and {len(here)} ({_count(here):,} values) here; calibrate with the same "
                "--model, --stages and --credit."
            )


def _count(shapes: list[Any]) -> int:
    return sum(math.prod(shape) for shape, _ in shapes)


def _told(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")


# ---- to JSON and back ------------------------------------------------------------------------------------------------


def _device(device: Device) -> dict[str, Any]:
    return {
        "flops": device.flops,
        "memory_bandwidth": _finite(device.memory_bandwidth),
        "memory": device.memory,
    }


def _read_device(values: Mapping[str, Any]) -> Device:
    return Device(_number(values["flops"]), _or_infinite(values["memory_bandwidth"]), values["memory"])


def _network(network: Network) -> dict[str, Any]:
    return {
        "latency": network.edge.latency,
        "bandwidth": _finite(network.edge.bandwidth),
        "send": list(network.send),
        "receive": list(network.receive),
        "exchange": list(network.exchange),
        "collective": network.collective,
    }


def _read_network(values: Mapping[str, Any]) -> Network:
    return Network(
        Edge(_number(values["latency"]), _or_infinite(values["bandwidth"])),
        send=_line(values["send"]),
        receive=_line(values["receive"]),
        exchange=_line(values["exchange"]),
        collective=values["collective"],
    )


def _stage(stage: StageCosts) -> dict[str, Any]:
    shape = stage.profile
    return {
        "seconds": {part: list(line) for part, line in stage.seconds.items()},
        "state": stage.state,
        "input": list(shape.input),
        "output": list(shape.output),
        "dtype": _name(shape.dtype),
        "weights": [[list(size), _name(dtype)] for size, dtype in shape.weights],
        "head_weights": shape.head_weights,
        "parameters": shape.parameters,
        "trained": shape.trained,
        "kept": list(shape.kept),
        "head_kept": list(shape.head_kept),
        "done": [list(pair) for pair in shape.done],
        "flops": {part: list(line) for part, line in shape.flops.items()},
        "holdings": {what: [list(one.kept), list(one.again)] for what, one in shape.holdings.items()},
    }


def _read_stage(values: Mapping[str, Any]) -> StageCosts:
    shape = StageProfile(
        flops={part: _line(line) for part, line in values["flops"].items()},
        input=tuple(values["input"]),
        output=tuple(values["output"]),
        dtype=_dtype(values["dtype"]),
        weights=tuple((tuple(size), _dtype(name)) for size, name in values["weights"]),
        head_weights=values["head_weights"],
        parameters=values["parameters"],
        trained=values["trained"],
        kept=_line(values["kept"]),
        head_kept=_line(values["head_kept"]),
        done=tuple((_number(share), _number(time)) for share, time in values["done"]),
        # files of before delayed rules have none
        holdings={what: Holding(*map(_line, lines)) for what, lines in values.get("holdings", {}).items()},
    )
    return StageCosts({part: _line(line) for part, line in values["seconds"].items()}, shape, values["state"])


def _line(values: Any) -> Line:
    fixed, each = values
    return Line(_number(fixed), _number(each))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} stands where a number belongs")
    return value


def _or_infinite(value: Any) -> float:
    return math.inf if value is None else _number(value)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of numbers")
    return found
