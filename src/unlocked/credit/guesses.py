"""What a forward gradient projects its target on: random directions, or what a local head would like (F §4.2.1).

    gaussian      v ~ N(0, 1), rademacher  v = ±1          E v vᵀ = 1
    local         ∂ℓ^j/∂h, the stage's trained head; for the weights carried through the body, (∂h/∂θ)ᵀ ∂ℓ^j/∂h
    ntk           the same of a head drawn anew for every batch (the neural tangent kernel of the model, at finite width)
    fixed-ntk     the same of one random head that is kept (F B.2.2), close to direct feedback alignment

h output of stage j, ℓ^j the loss of its head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain, Stage
from ..errors import InvalidChoice
from ..modes import statistics_kept
from ..rng import seed_of
from .base import detached

Guess = Literal["local", "ntk", "fixed-ntk", "gaussian", "rademacher"]
RANDOM = ("gaussian", "rademacher")


def random_like(x: Tensor, guess: str) -> Tensor:
    """A random direction, from the worker's random state."""
    if guess == "gaussian":
        return torch.randn_like(x)
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype).mul_(2).sub_(1)


def add_guess_heads(chain: Chain, seed: int) -> None:
    """Give every stage below the last a random head of the make of its trained one, which is never trained.

    Raises InvalidChoice for heads that read weights of another stage: they are no heads of their own.
    """
    for j in range(len(chain) - 1):
        stage = chain[j]
        if stage.guess_head is not None or stage.head is None:
            continue
        if stage.borrows is not None:
            raise InvalidChoice(
                f"The head of stage {j} reads weights of another stage, so it cannot be drawn at random by itself; take head="
                "linear, mlp, cnn or predsim for guess='ntk' and 'fixed-ntk'."
            )
        head = copy.deepcopy(stage.head)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, "guess-head", j))
            redraw(head)
        stage.guess_head = head.requires_grad_(False)


def redraw(head: nn.Module) -> None:
    """New weights for every part, by its own law. Raises InvalidChoice for a part that does not say how it is drawn."""
    for name, part in head.named_modules():
        own = [*part.parameters(recurse=False)]
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # type: ignore[operator]
        elif own:
            raise InvalidChoice(
                f"The head's part {name or 'itself'} ({type(part).__name__}) has weights but no reset_parameters(), so it "
                "cannot be drawn anew; take a named head (linear, mlp, cnn, predsim), or give it that method."
            )


def guessed_by_random_head(stage: Stage, h: Tensor, batch: Batch, anew: bool) -> Tensor:
    """∂ℓ/∂h of the stage's random head, drawn `anew` or kept; nothing of it is trained, its statistics are left alone. A guess
    has no micro-batch's weight: the target has it."""
    head = stage.guess_head
    assert head is not None
    if anew:
        redraw(head)
    copied = h.detach().requires_grad_()
    with statistics_kept(head.modules()):
        return torch.autograd.grad(stage.judge(head(copied), batch), copied)[0]


def for_weights(h: Tensor, parameters: Sequence[nn.Parameter], gradient: Tensor, keep: bool = False) -> list[Tensor]:
    """(∂h/∂θ)ᵀ `gradient` for each parameter, dense; zero where the body does not use it. `keep` the graph.

    Raises UnlockedError if `h` depends on nothing that learns.
    """
    if not parameters:
        return []  # all of them frozen; torch refuses to be asked for nothing
    if not h.requires_grad:
        raise detached("a stage")
    found = torch.autograd.grad(h, list(parameters), gradient, retain_graph=keep, allow_unused=True)
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, dense)]
