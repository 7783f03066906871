"""A network in any number of stages, and what each costs, on shapes alone: no weight is allocated, nothing is computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..chain import Chain, Stage
from ..credit import DGL, Backprop, Credit, Greedy, Interlocking
from ..credit.delayed import Delayed
from ..credit.gpipe import Flushed
from ..cutting import _bodies, _pieces, _sizes, _units, _user_names
from ..errors import CannotCut, InvalidChoice, UnlockedError
from ..models import encoder
from ..simulation.profile import Profile, profile

Made = nn.Module | Callable[[int], Chain]


class Cuts:
    """The network, cut as often as asked for.

    Args:
        model: a module that `cut` can cut; a chain, which is taken as it is or joined to one stage; or a function from a number
            of stages to a chain.
        like: an example batch; may be left out where chains have their own.

    Self-supervised rules get the module without its classifier, if it has one; a chain, or a function that makes chains, must
    come without it. Raises CannotCut.
    """

    def __init__(self, model: Made, like: Tensor | None) -> None:
        if not isinstance(model, nn.Module) and not callable(model):
            raise CannotCut(
                f"A plan needs a module, a chain, or a function from a number of stages to a chain; "
                f"given {type(model).__name__}."
            )
        if isinstance(model, nn.Module) and not isinstance(model, Chain) and like is None:
            raise CannotCut("A plan needs an example batch to follow the shapes: plan(model, like=x, …).")
        self._like = None if like is None else like[:2].to("meta")
        self._model = _shapes_of(model) if isinstance(model, nn.Module) else model
        self._sizes: dict[int, list[int]] = {}
        self._headed: dict[tuple[int, Credit], tuple[Chain, Profile]] = {}
        self._profiles: dict[Any, Profile] = {}

    def chain(self, stages: int) -> Chain:
        """A new chain of so many stages on the meta device. Raises CannotCut if the network has no such cut."""
        with _on_shapes_alone():
            chain = self._cut(stages)
        if chain.like is None:
            raise CannotCut("A plan needs an example batch to follow the shapes: plan(…, like=x).")
        if not any(part.training for part in chain.modules() if not list(part.children())):
            chain.train()
        return chain

    def profiled(self, stages: int, credit: Credit) -> tuple[Chain, Profile]:
        """A chain with the heads the rule needs, and what its stages cost. Raises CannotCut, HeadTooLarge, InvalidChoice."""
        return (self._encoder if credit.self_supervised else self)._with_heads(stages, credit)

    @functools.cached_property
    def _encoder(self) -> Cuts:
        """Of the network without its classifier."""
        recipe = getattr(self._model, "recipe", None) or {}
        if not isinstance(self._model, nn.Module) or isinstance(self._model, Chain) or recipe.get("encoder"):
            return self
        try:
            return Cuts(encoder(self._model), self._like)
        except InvalidChoice:
            if recipe:  # a network of ul.models must have one
                raise
            return self

    def _with_heads(self, stages: int, credit: Credit) -> tuple[Chain, Profile]:
        credit = _with_the_same_heads(credit)
        if (stages, credit) not in self._headed:
            self._headed[stages, credit] = self._profiled(stages, credit)
        return self._headed[stages, credit]

    def _profiled(self, stages: int, credit: Credit) -> tuple[Chain, Profile]:
        chain = self.chain(stages)
        with _on_shapes_alone():
            heads = tuple(credit.prepare(chain, 0))
            key = (stages, heads, tuple(repr(stage.loss) for stage in chain) if heads else ())
            if key not in self._profiles:
                self._profiles[key] = profile(chain)
        return chain, self._profiles[key]

    def _cut(self, stages: int) -> Chain:
        if isinstance(self._model, Chain):
            return self._of_chain(self._model, stages)
        if isinstance(self._model, nn.Module):
            return self._of_module(self._model, stages)
        chain = self._model(stages)
        if not isinstance(chain, Chain) or len(chain) != stages:
            raise CannotCut(f"The function given must make a Chain of {stages} stage(s); it made {_what(chain)}.")
        like = chain.like if self._like is None else self._like
        chain = chain.blank("meta")
        chain.like = None if like is None else like.to("meta")
        return chain

    def _of_module(self, model: nn.Module, stages: int) -> Chain:
        """As `cut` does it, without comparing values, of which there are none."""
        assert self._like is not None
        units = _units(_pieces(model))
        if stages not in self._sizes:
            self._sizes[stages] = _sizes(units, stages, self._like, "flops")
        bodies = _bodies(units, self._sizes[stages])
        return Chain([Stage(body) for body in bodies], self._like, _user_names(model, bodies))

    def _of_chain(self, chain: Chain, stages: int) -> Chain:
        if stages not in (1, len(chain)):
            raise CannotCut(
                f"The chain given has {len(chain)} stages; it can be joined to one, but not cut into {stages}."
            )
        rows = list(chain)
        like = chain.like if self._like is None else self._like
        if stages == len(chain):
            return Chain(_apart(rows), like, chain.names, layout=chain.layout.groups)
        if not chain.layout.plain:
            raise CannotCut("A chain with groups side by side cannot be joined to one stage; plan the model itself.")
        return Chain([Stage(nn.Sequential(*[stage.body for stage in rows]), rows[-1].head, rows[-1].loss)], like)


@contextlib.contextmanager
def _on_shapes_alone() -> Iterator[None]:
    """Turns what a network does without values into a sentence."""
    try:
        yield
    except UnlockedError:
        raise
    except Exception as error:  # a network may do anything with a tensor that has no values
        first = [*str(error).splitlines(), ""][0][:200]
        raise CannotCut(
            f"The network could not be run on shapes alone ({type(error).__name__}: {first}); a plan needs an example "
            "batch that suits it, and a forward that does not look at values."
        ) from error


def _with_the_same_heads(credit: Credit) -> Credit:
    """One rule for all whose heads are the same, so that they are built and read once."""
    if isinstance(credit, Greedy) or (isinstance(credit, Interlocking) and credit.idle_heads):
        return DGL(credit.head, credit.budget)
    return Backprop() if isinstance(credit, (Flushed, Delayed)) else credit


def _apart(stages: list[Stage]) -> list[Stage]:
    """Stages of their own with the same bodies: heads put on them later are theirs alone."""
    return [Stage(stage.body, stage.head, stage.loss) for stage in stages]


def _shapes_of(model: nn.Module) -> nn.Module:
    """The module without values."""
    if isinstance(model, Chain):
        blank = model.blank("meta")
        blank.like = None if blank.like is None else blank.like.to("meta")
        return blank
    return Chain([Stage(model)]).blank("meta")[0].body


def _what(given: object) -> str:
    return f"one of {len(given)}" if isinstance(given, Chain) else f"a {type(given).__name__}"
