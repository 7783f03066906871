"""REPAIR: give an averaged network's activations the statistics that its members' activations have.

Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair" (2023).

    for every channel of every layer:   E[z] ← 1/N Σ_n E[z_n],   std[z] ← 1/N Σ_n std[z_n]
    by  z ← a z + b,  a = target std / own std,  b = target mean − a · own mean,  written into the layer's weights

z is what a layer puts out before its activation function, z_n that of member n, in evaluation mode; a channel's statistics are
over all samples and positions (std divides by their number). What is corrected, and where the correction goes:

    BatchNorm                       z is its output. Running mean and variance become those of its input in this network,
                                    then weight = ± target std · √(variance + ε) / √variance, with the sign it had, and
                                    bias = target mean. Without affine parameters the running statistics take the correction.
    layer before a BatchNorm        nothing: the BatchNorm right behind it does it, so no bias is needed
    convolution, linear layer       weight ← a · weight, bias ← a · bias + b
    the same without a bias         only scaled, as the architecture stays what it is: the std is the target, the mean is not
    last layer (the classifier)     nothing, unless asked for: the paper corrects hidden units

Left out, with the reason in `Repair.left_out`: layers that are called more than once, share their weight with another module or
are parametrised, grouped transposed convolutions, a BatchNorm without running statistics. A channel that is constant in the
averaged network cannot be scaled; it is shifted.

Layer by layer (the default): each layer is measured when all before it are corrected, so that afterwards every corrected
channel has its target statistics exactly, on these batches. It costs about L/2 forwards over them for L layers. In one pass:
every batch is normalised by its own statistics on the way, and their plain means are written in at the end, as a BatchNorm in
training mode behind every layer would do; one forward, exact for one batch, close for several large ones.

Limits: a network repaired to itself, or to N copies of itself, computes the same function.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from ..modes import modes_kept
from .averaging import refuse_unlike
from .predicting import Batch, Batches, device_of


class Repair(NamedTuple):
    """model: the repaired network. corrected: the modules whose mean and std are the targets; scaled: those without a bias,
    whose std is; left_out: the others, with the reason."""

    model: nn.Module
    corrected: tuple[str, ...]
    scaled: tuple[str, ...]
    left_out: dict[str, str]


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, (C,) float64."""

    mean: Tensor
    std: Tensor


def repair(
    model: nn.Module,
    members: Sequence[nn.Module],
    batches: Any,
    *,
    classifier: bool = False,
    one_pass: bool = False,
    batch_size: int = 512,
) -> Repair:
    """A repaired copy of `model`, usually the members' mean, with statistics from `batches` (anything `Batches` takes).

    classifier: correct the last layer as well. one_pass: on the way instead of layer by layer; see above.
    Raises InvalidChoice for networks of different architectures and for no data.
    """
    refuse_unlike([model, *members])
    data = Batches(batches, batch_size)
    network = copy.deepcopy(model)
    names, left_out = _sites(network, next(iter(data))[0], classifier)
    targets = _targets(members, names, data)
    parts = dict(network.named_modules())
    if one_pass:
        for name, found in _on_the_way(network, targets, data).items():
            _correct(parts[name], found, targets[name])
    else:
        for name in names:
            found = _measured(network, [name], data)[name]
            _correct(parts[name], found, targets[name])
    scaled = tuple(name for name in names if not _shifts(parts[name]))
    return Repair(network, tuple(name for name in names if name not in scaled), scaled, left_out)


def _targets(members: Sequence[nn.Module], names: Sequence[str], data: Batches) -> dict[str, Statistics]:
    """Means over the members of the means and of the standard deviations of what each layer puts out."""
    rows = []
    for member in members:
        parts, found = dict(member.named_modules()), _measured(member, names, data)
        rows.append({name: _put_out(parts[name], found[name]) for name in names})
    return {
        name: Statistics(*(torch.stack([row[name][k] for row in rows]).mean(0) for k in range(2))) for name in names
    }


# ---- which layers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _sites(network: nn.Module, x: Tensor, classifier: bool) -> tuple[list[str], dict[str, str]]:
    """The modules to correct, in the order of the forward, and those left out with the reason."""
    called: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def note(name: str, part: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        called.append((name, part, given[0], output))  # they are kept, so that no two have one identity

    with _hooked(network, _repairable(network), note):
        network(x.to(device_of(network)))
    counts = Counter(name for name, *_ in called)
    owners = Counter(id(x) for part in network.modules() for x in part._parameters.values() if x is not None)
    normalised = {id(given) for _, part, given, _ in called if isinstance(part, _BatchNorm)}
    names: list[str] = []
    left_out: dict[str, str] = {}
    for name, part, _, output in called:
        if not isinstance(part, _BatchNorm) and id(output) in normalised:
            continue
        reason = _cannot(part, counts[name], owners)
        if reason:
            left_out[name] = reason
        elif name not in names:
            names.append(name)
    last = called[-1][0] if called else ""
    if not classifier and last in names and not isinstance(called[-1][1], _BatchNorm):
        names.remove(last)
        left_out[last] = "it is the last layer"
    return names, left_out


def _repairable(network: nn.Module) -> list[str]:
    return [name for name, part in network.named_modules() if isinstance(part, (_ConvNd, nn.Linear, _BatchNorm))]


def _cannot(part: nn.Module, calls: int, owners: Counter[int]) -> str | None:
    """Why a layer is left out, if it is."""
    if calls > 1:
        return "it is called more than once"
    if is_parametrized(part) or "weight_g" in part._parameters:
        return "its weight is parametrised"
    if any(owners[id(x)] > 1 for x in part._parameters.values() if x is not None):
        return "it shares a parameter with another module"
    if isinstance(part, _BatchNorm) and part.running_mean is None:
        return "it keeps no running statistics"
    if isinstance(part, _ConvTransposeNd) and part.groups > 1:
        return "it is a transposed convolution with groups"
    return None


def _shifts(part: nn.Module) -> bool:
    """Whether a layer's output can be shifted."""
    return isinstance(part, _BatchNorm) or part.bias is not None


# ---- statistics ------------------------------------------------------------------------------------------------------


class _Moments:
    """Count, mean and sum of squared deviations of each channel, joined batch by batch (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Values (M, C)."""
        rows = rows.double()
        count, mean = len(rows), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.count:
            total, apart = self.count + count, mean - self.mean
            squares = self.squares + squares + apart.square() * (self.count * count / total)
            mean = self.mean + apart * (count / total)
            count = total
        self.count, self.mean, self.squares = count, mean, squares

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.mean, (self.squares / self.count).sqrt())


class _Enough(Exception):
    """What was to be measured has been; the rest of the forward is not needed."""


@torch.no_grad()
def _measured(network: nn.Module, names: Sequence[str], data: Iterable[Batch]) -> dict[str, Statistics]:
    """Of what each of these layers puts out, for a BatchNorm of what it takes in; over all batches, in evaluation mode."""
    found = {name: _Moments() for name in names}

    def measure(name: str, part: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found[name].add(_rows(part, given[0] if isinstance(part, _BatchNorm) else output))
        if len(names) == 1:
            raise _Enough

    device = device_of(network)
    with _hooked(network, names, measure):
        for x, _ in data if names else ():
            with contextlib.suppress(_Enough):
                network(x.to(device))
    return {name: moments.statistics for name, moments in found.items()}


@torch.no_grad()
def _on_the_way(network: nn.Module, targets: dict[str, Statistics], data: Iterable[Batch]) -> dict[str, Statistics]:
    """One pass in which every layer already puts out the target statistics; the mean over batches of its own."""
    found: dict[str, list[Statistics]] = {name: [] for name in targets}

    def normalise(name: str, part: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        moments = _Moments()
        moments.add(_rows(part, given[0] if isinstance(part, _BatchNorm) else output))
        found[name].append(moments.statistics)
        scale, shift = _scale_and_shift(part, _put_out(part, moments.statistics), targets[name])
        shape = [1] * output.dim()
        shape[_channels(part)] = -1
        return output * scale.to(output.dtype).view(shape) + shift.to(output.dtype).view(shape)

    device = device_of(network)
    with _hooked(network, list(targets), normalise):
        for x, _ in data:
            network(x.to(device))
    return {name: _mean_of(rows) for name, rows in found.items()}


def _mean_of(rows: Sequence[Statistics]) -> Statistics:
    """The plain mean of means and of variances, as a BatchNorm with cumulative averages has it."""
    means, stds = (torch.stack(part) for part in zip(*rows))
    return Statistics(means.mean(0), stds.square().mean(0).sqrt())


@contextlib.contextmanager
def _hooked(network: nn.Module, names: Iterable[str], see: Callable[..., Any]) -> Iterator[None]:
    """In evaluation mode, `see(name, module, inputs, output)` is called behind these modules; what it returns replaces the
    output."""
    parts, handles = dict(network.named_modules()), []

    def hook_of(name: str) -> Callable[..., Any]:
        return lambda part, given, output: see(name, part, given or (None,), output)

    try:
        with modes_kept(network):
            network.eval()
            handles += [parts[name].register_forward_hook(hook_of(name)) for name in names]
            yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(part: nn.Module) -> int:
    """The dimension of the channels in what a layer puts out."""
    return -1 if isinstance(part, nn.Linear) else 1


def _rows(part: nn.Module, x: Tensor) -> Tensor:
    """(B, …) as (positions, channels)."""
    return x.movedim(_channels(part), -1).flatten(0, -2)


# ---- the correction --------------------------------------------------------------------------------------------------


def _put_out(part: nn.Module, found: Statistics) -> Statistics:
    """Of a layer's output; a BatchNorm was measured at its input, and is a straight line in evaluation mode."""
    if not isinstance(part, _BatchNorm):
        return found
    assert part.running_mean is not None and part.running_var is not None
    slope = (part.running_var.double() + part.eps).rsqrt()
    shift = -part.running_mean.double() * slope
    if part.affine:
        slope, shift = slope * part.weight.double(), shift * part.weight.double() + part.bias.double()
    return Statistics(found.mean * slope + shift, found.std * slope.abs())


def _scale_and_shift(part: nn.Module, own: Statistics, target: Statistics) -> tuple[Tensor, Tensor]:
    """a and b of z ← a z + b; b is 0 for a layer that cannot be shifted."""
    scale = torch.where(_varies(part, own, target), target.std / own.std, 1.0)
    return scale, target.mean - scale * own.mean if _shifts(part) else torch.zeros_like(scale)


def _varies(part: nn.Module, own: Statistics, target: Statistics) -> Tensor:
    """Whether a channel's own deviation is more than rounding."""
    kind = next((x.dtype for x in part.parameters()), torch.float32)
    return own.std > torch.finfo(kind).eps * (own.mean.abs() + target.std)


@torch.no_grad()
def _correct(part: Any, found: Statistics, target: Statistics) -> None:
    """Write the correction into a layer that was measured as `found`."""
    if isinstance(part, _BatchNorm):
        _correct_norm(part, found, target)
        return
    scale, shift = _scale_and_shift(part, found, target)
    shape = [1] * part.weight.dim()
    shape[1 if isinstance(part, _ConvTransposeNd) else 0] = -1
    part.weight.copy_(part.weight * scale.view(shape))
    if part.bias is not None:
        part.bias.copy_(part.bias * scale + shift)


def _correct_norm(norm: _BatchNorm, found: Statistics, target: Statistics) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    varies = _varies(norm, found, target)
    if not norm.affine:  # (x − m)/√(v + ε) has the target statistics with these m and v
        possible = varies & (target.std > 0)
        spread = torch.where(possible, found.std / target.std, (norm.running_var.double() + norm.eps).sqrt())
        norm.running_mean.copy_(found.mean - target.mean * spread)
        norm.running_var.copy_((spread.square() - norm.eps).clamp_min(0))
        return
    norm.running_mean.copy_(found.mean)
    norm.running_var.copy_(torch.where(varies, found.std.square(), norm.running_var.double()))
    sign = torch.where(norm.weight < 0, -1.0, 1.0).double()
    slope = sign * target.std * (found.std.square() + norm.eps).sqrt() / found.std
    norm.weight.copy_(torch.where(varies, slope, norm.weight.double()))
    norm.bias.copy_(target.mean)
