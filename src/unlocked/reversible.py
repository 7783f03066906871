"""Reversible layers: what went in is computed from what came out, so nothing has to be kept for the backward.

Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network" (2017) (the form of two couplings, `pair`);
Rivaud, Fournier, Pumir, Belilovsky, Eickenberg, Oyallon, "PETRA: Parallel End-to-end Training with Reversible
Architectures" (2024) (the half coupling with a swap, `Coupling`, and the fused step, `Coupling.reverse`).

    forward   (x, x̃) → (y, x)       y = x̃ + F(x)
    inverse   (y, x) → (x, x̃)       x̃ = y − F(x)
    reverse   (y, x), (d₁, d₂) → (x, x̃), (d₂ + F'(x)ᵀ d₁, d₁)       with one evaluation of F

x, x̃: the two streams, of one shape; F: any module that keeps the shape; d₁, d₂: gradients of the loss in y and in the
second stream of the output. Two streams travel as one tensor, their concatenation along `dim` (1 for images
(B, C, H, W), −1 for tokens (B, t, D)), so between two stages there is still one tensor.

Limits. The inverse is exact in exact arithmetic. In floating point, with unit roundoff u and the same F(x) both times,
y = (x̃ + F)(1 + δ) and x̃' = (y − F)(1 + δ'), |δ| ≤ u each, so for every element

    |x̃' − x̃| ≤ u (|y| + |x̃'|),        u = 2⁻⁸ (bfloat16), 2⁻¹¹ (float16), 2⁻²⁴ (float32), 2⁻⁵³ (float64)

and x itself comes back bit for bit. In a stack the next F sees that error and may enlarge it (by its Lipschitz constant).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .costs import untouched
from .errors import InvalidChoice, UnlockedError

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
"""What `check` allows by default. For the half precisions it is 2u, the bound above for one coupling and no more."""


class Reversible(nn.Module, ABC):
    """What can be run backwards; streams travel as one tensor. Any module with these two methods counts (`is_reversible`)."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """The output → the input, without a graph."""

    @abstractmethod
    def reverse(self, z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The output and its gradient → the input and its gradient; weights' gradients are added to their `.grad`."""


class Coupling(Reversible):
    """The additive coupling with a swap, (x, x̃) → (x̃ + F(x), x), of any module F that keeps the shape.

    Args:
        function: F, called with one stream and returning a tensor of its shape.
        dim: where the two streams are concatenated, and what their sizes are half of.
        like: an example of the input (both streams). With it, F's shape and the inverse are checked here, in the mode F is
            in; F, its buffers and the global random state stay as they were.

    F is evaluated again in `inverse` and `reverse`. So whoever calls them sees to it that F computes the same as in `forward`:
    the random state before is the same (dropout), and so are buffers F reads; buffers that F writes (BatchNorm's statistics)
    are written once more, and putting them back is the caller's, too. F may not change its input in place.

    Raises InvalidChoice if a size along `dim` is odd or F changes the shape, UnlockedError if the inverse fails on `like`.
    """

    def __init__(self, function: nn.Module, dim: int = 1, like: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.dim = dim
        if like is not None:
            check(self, like)

    def forward(self, z: Tensor) -> Tensor:
        """cat[x, x̃] → cat[x̃ + F(x), x]."""
        x, other = halves(z, self.dim)
        return torch.cat([other + self._value(x), x], self.dim)

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """cat[y, x] → cat[x, y − F(x)], without a graph."""
        y, x = halves(z, self.dim)
        return torch.cat([x, y - self._value(x)], self.dim)

    @torch.no_grad()
    def reverse(self, z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The output and its gradient → the input and its gradient; the weights' gradients are added to their `.grad`.

        F is evaluated once. Nothing returned has a graph. It works where gradients are switched off.
        """
        y, x = halves(z, self.dim)
        first, second = halves(gradient, self.dim)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self._value(x)
        other = y - value.detach()
        if value.requires_grad:
            torch.autograd.backward(value, first)
        through = second if x.grad is None else second + x.grad
        return torch.cat([x.detach(), other], self.dim), torch.cat([through, first], self.dim)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"dim={self.dim}"

    def _value(self, x: Tensor) -> Tensor:
        """F(x), in the precision of the streams (under autocast F may give a lower one)."""
        value = self.function(x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidChoice(
                f"A coupling adds its function's output to a stream, so the output must have the shape of the input; "
                f"{type(self.function).__name__} made {given} of {tuple(x.shape)}. Let it keep the shape, or leave this "
                "part of the network as it is: it is then not reversible, and its input is kept."
            )
        return value.to(x.dtype)


class Split(nn.Module):
    """One stream becomes two equal ones, x → cat[x, x]. Not reversible: it comes once, after the stem."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """x → cat[x, x], twice the size along `dim`."""
        return torch.cat([x, x], self.dim)


def pair(f: nn.Module, g: nn.Module, dim: int = 1, like: Tensor | None = None) -> nn.Sequential:
    """The RevNet block y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁) of any two modules, as two couplings in a row.

    The second stream stands first in the concatenation, before and after: cat[x₂, x₁] → cat[y₁, x₂] → cat[y₂, y₁].
    So pairs can follow each other. Arguments and errors as for `Coupling`; `like` is an example of cat[x₂, x₁].
    """
    first = Coupling(f, dim, like)
    if like is not None:
        with untouched(first), torch.no_grad():
            like = first(like)
    return nn.Sequential(first, Coupling(g, dim, like))


def halves(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two streams in `z`. Raises InvalidChoice if the size along `dim` is odd."""
    if not -z.dim() <= dim < z.dim() or z.shape[dim] % 2:
        raise InvalidChoice(
            f"Two streams of one shape must stand in the tensor along dimension {dim}, so it must have an even size there; "
            f"given the shape {tuple(z.shape)}. Concatenate both streams, torch.cat([x, x̃], {dim}), or begin with Split({dim})."
        )
    first, second = z.chunk(2, dim)
    return first, second


def units(body: nn.Module) -> list[nn.Module]:
    """The modules that `body` runs one after the other (nn.Sequential and models with `pieces()` are opened, nested, too)."""
    from .models.pieces import pieces_of  # the models import this file

    pieces = pieces_of(body)
    return [body] if pieces is None else [unit for piece in pieces for unit in units(piece.module)]


def is_reversible(unit: nn.Module) -> TypeGuard[Reversible]:
    """Whether a unit can be run backwards: it has the methods `inverse` and `reverse`, as every Coupling."""
    return all(callable(getattr(unit, name, None)) for name in ("inverse", "reverse"))


def check(unit: nn.Module, x: Tensor, tolerance: float | None = None) -> float:
    """How far inverse(forward(x)) is from x; raises UnlockedError, which names the unit, if that is above `tolerance`.

    Measured as the largest |difference| of any element over the largest |number| in the input and the output. Default of
    `tolerance`: by x's dtype, see TOLERANCES. The unit runs in the mode it is in, with the same random numbers and buffers
    both times, and is left without a trace. Raises InvalidChoice if the unit is not reversible.
    """
    label = f"Coupling of {type(unit.function).__name__}" if isinstance(unit, Coupling) else type(unit).__name__
    if not is_reversible(unit):
        raise InvalidChoice(
            f"{label} has no methods inverse and reverse; wrap a module that keeps the shape in Coupling."
        )
    with untouched(unit), torch.no_grad():
        y = unit(x.clone())  # if the unit writes into its input, the copy differs, and it shows
    with untouched(unit), torch.no_grad():
        back = unit.inverse(y)
    size = max(_largest(x), _largest(y))
    error = _largest(back.double() - x.double()) / size if size else _largest(back)
    allowed = TOLERANCES.get(x.dtype, 0.0) if tolerance is None else tolerance
    if not error <= allowed:  # NaN is above everything
        raise UnlockedError(
            f"The inverse of {label} misses its input by {error:.1e} of the largest number; allowed is {allowed:.1e} "
            f"({x.dtype}). Its function must compute the same twice (no state, no random numbers of its own, no change "
            "of its input in place), with numbers that are finite and not huge."
        )
    return error


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
