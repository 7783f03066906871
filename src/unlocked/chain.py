"""A network as a chain of stages.

    stage j = body f_j (a part of the user's network), optional head a_j (an auxiliary network), loss ℓ_j
    chain   = f_J ∘ … ∘ f_1, the ordinary network; heads are beside it, not in it

Neuron groups: several stages may stand side by side at one depth. Each of them reads all that the depth below puts out, its
groups' outputs joined along channels; `layout` says how many there are at each depth, (1, 2, 2, 1) say, and stages are
numbered depth by depth. Without groups the layout is all ones.

`cut` (cutting.py) makes a chain from a whole model; a chain can also be written by hand from any modules.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch import Batch
from .errors import CannotCut, UnlockedError
from .losses import Loss, cross_entropy, reads_input


class Loan(NamedTuple):
    """Weights of one stage that another's head reads, sent in every step whose number `period` divides (credit/lending.py).

    names: of the tensors in the lender's stage. likes: their shapes and dtypes, without values.
    """

    borrower: int
    lender: int
    period: int
    names: tuple[str, ...]
    likes: tuple[Tensor, ...]


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
        self.guess_head: nn.Module | None = None  # a random one that is never trained (credit/forward_gradient.py)
        self.mixed_above = True  # whether stages above may mix the samples of a batch (credit/forward_gradient.py)
        self.loss: Loss = loss or cross_entropy
        self.watched = False  # whether the head is there to be watched only: then its gradient is clipped by itself
        self.reads_siblings = False  # whether the head reads what all groups of its depth put out
        self.lends: tuple[Loan, ...] = ()
        self.borrows: Loan | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The body's output."""
        return self.body(x)

    def read(self, h: Tensor) -> Any:
        """What the loss sees of the body's output `h`: the head's output, or `h` itself."""
        return h if self.head is None else self.head(h)

    def judge(self, output: Any, batch: Batch) -> Tensor:
        """The stage's loss of what `read` gave; a loss with `reads_input` is given the network's input, too."""
        return self.loss(output, batch.y, batch.x) if reads_input(self.loss) else self.loss(output, batch.y)  # type: ignore[call-arg]


class Chain(nn.Module):
    """Stages in order. `chain(x)` is the ordinary network, and `state_dict` has the user's own names (heads left out).

    Args:
        stages: the stages, at least one.
        like: an example batch. Needed only when a credit rule is to build heads by itself.
        names: for each tensor of the ordinary network's state: (user's name, stage, name inside that stage's body).
            Default: `"{stage}.{name inside the body}"`, as in an nn.Sequential of the bodies.
        recipe: how to build the same chain again, as JSON (see cutting.py), or None if only the user's code can.
        layout: how many stages stand side by side at each depth; default: one.

    Raises CannotCut if a parameter stands in two stages, or the layout has another number of stages.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        like: Tensor | None = None,
        names: Sequence[tuple[str, int, str]] | None = None,
        recipe: Mapping[str, Any] | None = None,
        layout: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise CannotCut("A chain needs at least one stage; none was given.")
        for j, stage in enumerate(stages):
            if not isinstance(stage, Stage):
                raise CannotCut(f"Stage {j} is a {type(stage).__name__}; wrap it: Stage(body, head=…, loss=…).")
        self.stages = nn.ModuleList(stages)
        self.layout = Layout(layout if layout is not None else [1] * len(stages), len(stages))
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
        for row in self.layout.rows:
            x = join([self[j](x) for j in row])
        return x

    def walk(
        self, x: Tensor, call: Callable[[int, Tensor], Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(j, input, output of the body) of every stage, in order. `call`: what gives the output (default: the stage)."""
        for row in self.layout.rows:
            outputs = []
            for j in row:
                outputs.append(call(j, x) if call is not None else self[j](x))
                yield j, x, outputs[-1]
            x = join(outputs)

    def read(self, x: Tensor, stage: int) -> Any:
        """The output of the head at `stage` (the network's own output at the last one)."""
        return next(self[stage].read(seen) for j, seen in self.seen(x) if j == stage)

    def seen(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(j, what the head of stage j reads) of every stage, in order: the stage's output, or that of its whole depth."""
        for row in self.layout.rows:
            outputs = [self[j](x) for j in row]
            x = join(outputs)
            for j, h in zip(row, outputs):
                yield j, x if self[j].reads_siblings else h

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


class Layout:
    """How many stages stand side by side at each depth. `rows`: the numbers of the stages of each depth."""

    def __init__(self, groups: Sequence[int], stages: int) -> None:
        if any(not isinstance(count, int) or count < 1 for count in groups) or sum(groups) != stages:
            raise CannotCut(
                f"layout={list(groups)} does not fit {stages} stage(s); give how many stand side by side at each depth, whole "
                "numbers of at least 1 that add up to the number of stages."
            )
        if groups[-1] != 1:
            raise CannotCut(f"layout={list(groups)} ends with {groups[-1]} stages side by side; the last must be one.")
        self.groups = tuple(groups)
        self.rows = [range(end - count, end) for count, end in zip(groups, accumulate(groups))]
        self._depths = [depth for depth, count in enumerate(groups) for _ in range(count)]

    @property
    def plain(self) -> bool:
        """Whether every depth has one stage."""
        return len(self.groups) == len(self._depths)

    def depth(self, stage: int) -> int:
        """At which depth a stage stands, from 0."""
        return self._depths[stage]

    def row(self, depth: int) -> range:
        """The stages of a depth; none below the first and above the last."""
        return self.rows[depth] if 0 <= depth < len(self.rows) else range(0)

    def beside(self, stage: int) -> range:
        """The stages of its depth, itself included."""
        return self.rows[self._depths[stage]]


def join(outputs: Sequence[Tensor]) -> Tensor:
    """The outputs of a depth's groups, one beside the other: channels of (B, C, H, W), entries of (B, D) and (B, T, D)."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), channel_axis(outputs[0]))


def channel_axis(x: Tensor) -> int:
    """Where groups are joined: 1 of (B, C, H, W) and (B, D), 2 of (B, T, D)."""
    return 2 if x.dim() == 3 else 1


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
