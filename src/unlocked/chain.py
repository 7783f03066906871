"""A network as a chain of stages.

    stage j = body f_j (a part of the user's network), optional head a_j (an auxiliary network), loss ℓ_j
    chain   = f_J ∘ … ∘ f_1, the ordinary network; heads are beside it, not in it

`cut` (cutting.py) makes a chain from a whole model; a chain can also be written by hand from any modules.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CannotCut, UnlockedError
from .losses import Loss, cross_entropy


class Stage(nn.Module):
    """One stage: `body` maps its input to its output; `head` maps that to what `loss` compares with the target.

    Args:
        body: any module with one tensor in and one tensor out.
        head: auxiliary network on the body's output. None: the credit rule builds one where it needs one; the last stage
            needs none, its body ends in the network's own classifier.
        loss: (output of the head, or of the body where there is no head; target) → scalar. Default: cross-entropy.
    """

    def __init__(self, body: nn.Module, head: nn.Module | None = None, loss: Loss | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.loss: Loss = loss or cross_entropy

    def forward(self, x: Tensor) -> Tensor:
        """The body's output."""
        return self.body(x)

    def read(self, h: Tensor) -> Any:
        """What the loss sees of the body's output `h`: the head's output, or `h` itself."""
        return h if self.head is None else self.head(h)


class Chain(nn.Module):
    """Stages in order. `chain(x)` is the ordinary network, and `state_dict` has the user's own names (heads left out).

    Args:
        stages: the stages, at least one.
        like: an example batch. Needed only when a credit rule is to build heads by itself.
        names: for each tensor of the ordinary network's state: (user's name, stage, name inside that stage's body).
            Default: `"{stage}.{name inside the body}"`, as in an nn.Sequential of the bodies.
        recipe: how to build the same chain again, as JSON (see cutting.py), or None if only the user's code can.

    Raises CannotCut if a parameter stands in two stages.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        like: Tensor | None = None,
        names: Sequence[tuple[str, int, str]] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise CannotCut("A chain needs at least one stage; none was given.")
        for j, stage in enumerate(stages):
            if not isinstance(stage, Stage):
                raise CannotCut(f"Stage {j} is a {type(stage).__name__}; wrap it: Stage(body, head=…, loss=…).")
        self.stages = nn.ModuleList(stages)
        self.names = list(names) if names is not None else _default_names(stages)
        self.recipe = dict(recipe) if recipe is not None else None
        self.like = None if like is None else like.detach()[:2].clone()
        refuse_shared_parameters(self)

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, j: int) -> Stage:
        return self.stages[j]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The ordinary network's output."""
        for stage in self.stages:
            x = stage(x)
        return x

    def read(self, x: Tensor, depth: int) -> Any:
        """The output of the head at stage `depth` (the network's own output at the last one)."""
        for stage in list(self)[: depth + 1]:
            x = stage(x)
        return self[depth].read(x)

    def blank(self, device: torch.device | str) -> Chain:
        """A new chain of the same making whose parameters and buffers are not initialised ("meta": not even allocated)."""
        memo: dict[int, Any] = {}
        for x in [*self.parameters(), *self.buffers()]:
            empty = torch.empty_like(x, device=device)
            memo[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return copy.deepcopy(self, memo)  # a tied parameter stays one, which to_empty would part

    def example(self) -> Tensor:
        """The example batch; raises UnlockedError if the chain was made without one."""
        if self.like is None:
            raise UnlockedError(
                "This chain has no example batch, so no head can be sized for it; "
                "give heads by hand, Stage(body, head=…), or make it with Chain(stages, like=x)."
            )
        return self.like

    # ---- the user's names ------------------------------------------------------------------------------------------

    def _tensors(self) -> OrderedDict[str, Tensor]:
        local = [stage.body.state_dict(keep_vars=True) for stage in self]
        return OrderedDict((name, local[j][inside]) for name, j, inside in self.names)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The ordinary network's parameters and buffers under the user's own names; heads are not in it."""
        out = OrderedDict() if destination is None else destination
        for name, tensor in self._tensors().items():
            out[prefix + name] = tensor if keep_vars else tensor.detach()
        return out

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy the tensors of a state dict with the user's names into the stages.

        Raises UnlockedError on missing or unexpected names (if `strict`), on unequal shapes, and on `assign=True`.
        """
        if assign:
            raise UnlockedError("Chain.load_state_dict copies values; assign=True is not supported.")
        mine = self._tensors()
        missing, unexpected = mine.keys() - state_dict.keys(), state_dict.keys() - mine.keys()
        if strict and (missing or unexpected):
            raise UnlockedError(
                f"The state does not fit this chain: missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}."
            )
        for name in mine.keys() & state_dict.keys():
            if mine[name].shape != state_dict[name].shape:
                raise UnlockedError(
                    f"{name} has shape {tuple(state_dict[name].shape)} in the state but {tuple(mine[name].shape)} here."
                )
        with torch.no_grad():
            for name in mine.keys() & state_dict.keys():
                mine[name].copy_(state_dict[name])

    def layers(self, what: str = "module") -> list[tuple[int, str, list[nn.Parameter]]]:
        """The ordinary network's layers in forward order: (stage, name inside the body, parameters).

        `what`: "module" (each module with parameters of its own is a layer), "tensor" (each parameter is one) or "block" (each
        part that a cut leaves whole; block_layers.py).
        """
        from .block_layers import blocks_of  # it needs Chain from this file

        layers = []
        seen: set[int] = set()  # a tied parameter belongs to the first layer that has it
        for j, stage in enumerate(self):
            if what == "block":
                layers += [(j, *block) for block in blocks_of(stage.body)]
                continue
            for name, module in stage.body.named_modules():
                own = [(key, x) for key, x in module.named_parameters(recurse=False) if id(x) not in seen]
                seen.update(id(x) for _, x in own)
                if what == "tensor":
                    layers += [(j, f"{name}.{tensor}", [parameter]) for tensor, parameter in own]
                elif own:
                    layers.append((j, name, [parameter for _, parameter in own]))
        return layers


def refuse_shared_parameters(chain: Chain) -> None:
    """Raises CannotCut if a parameter belongs to two stages: each stage updates its own weights, alone."""
    users: dict[tuple[int, str], list[str]] = {}
    for name, j, inside in chain.names:
        users.setdefault((j, inside), []).append(name)
    first: dict[int, tuple[int, list[str]]] = {}
    for j, stage in enumerate(chain):
        for inside, parameter in stage.named_parameters():
            names = users.get((j, inside.removeprefix("body.")), [])
            owner, known = first.setdefault(id(parameter), (j, names or [f"stages.{j}.{inside}"]))
            if owner != j:
                raise CannotCut(
                    f"{' and '.join(dict.fromkeys(known + names))}: one shared parameter, in stages {owner} and {j}; each "
                    "stage updates its weights alone, so untie them (for Hugging Face models: tie_word_embeddings=False) "
                    "or cut so that both uses are in one stage."
                )


def _default_names(stages: Sequence[Stage]) -> list[tuple[str, int, str]]:
    return [(f"{j}.{inside}", j, inside) for j, stage in enumerate(stages) for inside in stage.body.state_dict()]
