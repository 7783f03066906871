"""The weights that the members of a population begin with.

    same         all begin with replica 0's; members stay in one basin, and may be averaged
    different    members from 1 on are drawn anew, by the law of replica 0's

How "different" draws, from a seed of (run seed, "initial", member):

    networks of `unlocked.models`   built again from their recipe
    other networks                  `reset_parameters()` of every module with weights, children before their parents
    heads                           built again by the credit rule; those given by hand: `reset_parameters()`

Frozen parameters stay as they are. A network with an initialisation of its own, which `reset_parameters()` knows nothing of, is
noticed by the size of its weights and refused; for such ones `initial` is a function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..consensus.base import Consensus
from ..credit.base import Credit
from ..cutting import from_recipe_of_chain
from ..errors import InvalidChoice, choose
from ..rng import seed_of

Initial = Literal["same", "different"] | Callable[[int], Chain | nn.Module | Mapping[str, Tensor]]

_ADVICE = "give the members' weights yourself: initial=lambda n: a new model (or chain, or state dict) for member n."


def check_initial(initial: Any, consensus: Consensus, replicas: int) -> None:
    """Raises InvalidChoice for a value that is not allowed, and for a rule whose replicas must begin equal."""
    if not callable(initial):
        choose("initial", str(initial), ("same", "different"))
    if initial != "same" and consensus.needs_equal_start and replicas > 1:
        raise InvalidChoice(
            f"Under {consensus.name} all replicas must begin with the same weights; leave out initial, or use a rule whose "
            "members may differ, such as independent."
        )


def in_words(initial: Any) -> str:
    """`same`, `different`, or `given` for a function."""
    return "given" if callable(initial) else initial


class Drawing:
    """Draws the weights of members. `by_hand`: which stages had a head before the credit rule prepared the chain."""

    def __init__(self, initial: Initial, credit: Credit, seed: int, by_hand: Sequence[bool]) -> None:
        self._initial, self._credit, self._seed, self._by_hand = initial, credit, seed, by_hand

    def draw(self, chains: Sequence[Chain], members: Iterable[int]) -> None:
        """Give these members, copies of member 0, weights of their own. Raises InvalidChoice."""
        for member in members:
            if member and self._initial != "same":
                fresh = copy.deepcopy(chains[0]).cpu()
                fresh.like = None if fresh.like is None else fresh.like.cpu()
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed_of(self._seed, "initial", member))
                    self._fill(fresh, member)
                self._build_heads(fresh, member)
                _copy(fresh, chains[member])

    def _fill(self, fresh: Chain, member: int) -> None:
        """Everything but the heads that the credit rule has built."""
        if callable(self._initial):
            self._load(self._initial(member), fresh, member)
            return
        before = _values(fresh)
        if fresh.recipe is not None:
            fresh.load_state_dict(from_recipe_of_chain(fresh.recipe, fresh.example()).state_dict())
            if fresh.recipe.get("final") is not None:  # neuron groups: drawn from a seed that all members share
                _reset(fresh[-1].body, "the final head", before)
        for j, stage in enumerate(fresh):
            if fresh.recipe is None:
                _reset(stage.body, f"stage {j}", before)
            if stage.head is not None and self._by_hand[j]:
                _reset(stage.head, f"the head of stage {j}", before)
        _put_back_frozen(fresh, before)

    def _load(self, given: Any, fresh: Chain, member: int) -> None:
        """What the user's function gave, under the user's own names; of a chain also the heads given by hand."""
        if not isinstance(given, (nn.Module, Mapping)):
            raise InvalidChoice(
                f"initial({member}) gave a {type(given).__name__}; it must give member {member}'s chain, model or state dict."
            )
        fresh.load_state_dict(given.state_dict() if isinstance(given, nn.Module) else given)
        for j, theirs in enumerate(given if isinstance(given, Chain) and len(given) == len(fresh) else ()):
            mine = fresh[j].head
            if mine is not None and theirs.head is not None and self._by_hand[j]:
                mine.load_state_dict(theirs.head.state_dict())

    def _build_heads(self, fresh: Chain, member: int) -> None:
        built = [stage for j, stage in enumerate(fresh) if stage.head is not None and not self._by_hand[j]]
        for stage in built:
            stage.head = None
        if built:
            self._credit.prepare(fresh, seed_of(self._seed, "initial", member))


def _values(module: nn.Module) -> dict[int, Tensor]:
    """Copies of all tensors, by identity."""
    return {id(x): x.detach().clone() for x in [*module.parameters(), *module.buffers()]}


def _reset(module: nn.Module, where: str, before: Mapping[int, Tensor]) -> None:
    """Draw all weights anew. Raises InvalidChoice for a module that cannot, or that would draw by another law."""
    for name, part in reversed(list(module.named_modules())):  # children first: a parent's own rule has the last word
        trained = any(x.requires_grad for x in part.parameters(recurse=False))
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif trained:
            raise InvalidChoice(
                f"initial='different' draws weights by reset_parameters(), which {type(part).__name__} ({where}, "
                f"{name or 'itself'}) does not have; write one, or {_ADVICE}"
            )
    for name, x in module.named_parameters():
        if x.requires_grad and _differ(before[id(x)], x):
            raise InvalidChoice(
                f"reset_parameters() draws {name} of {where} at a size of {_size(x):.3g}, but replica 0's is at "
                f"{_size(before[id(x)]):.3g}: the network has an initialisation of its own (or was trained), which "
                f"initial='different' cannot repeat; {_ADVICE}"
            )


def _size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().square().mean().sqrt())


def _differ(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors cannot well be draws of one law: their sizes differ by more than chance (six deviations) and 10 %."""
    one, other = _size(before), _size(after)
    if min(one, other) == 0:
        return one != other
    return abs(math.log(one / other)) > 0.1 + 6 / math.sqrt(before.numel())


@torch.no_grad()
def _put_back_frozen(fresh: Chain, before: Mapping[int, Tensor]) -> None:
    """Frozen parameters, and the buffers of modules all of whose parameters are."""
    for part in fresh.modules():
        own = list(part.parameters(recurse=False))
        frozen = [x for x in own if not x.requires_grad]
        buffers = list(part.buffers(recurse=False)) if own and len(frozen) == len(own) else []
        for x in [*frozen, *buffers]:
            x.copy_(before[id(x)])


@torch.no_grad()
def _copy(source: Chain, target: Chain) -> None:
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, x in [*target.named_parameters(), *target.named_buffers()]:
        x.copy_(theirs[name])
