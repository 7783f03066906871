"""Where a program stands and what it can do: a worker and its verbs.

A training method is written once, as what one worker does, in these verbs only:

    await worker.run(kind, function, *arguments)      compute
    await worker.below.recv(channel, like)            take the next message of a FIFO channel (blocks)
    await worker.above.send(channel, x)               put a message on a FIFO channel (never blocks)
    await worker.replicas.mean(channel, tensors)      meet the same stage of the other replicas
    await worker.until(when)                          let the clock come to `when`
    await worker.beside(words, program)               another program of this worker, at the same time (worlds/beside.py)

Never hold a context manager of torch (no_grad, autocast, …) across an `await`: it would be on while others run. Put it
inside the function given to `run`.

What waiting means is the world's affair (worlds/): it provides the `Transport` behind the verbs. Workers that only take
from FIFO channels form a Kahn process network, so the result does not depend on who runs when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .chain import Layout, channel_axis, join
from .errors import UnlockedError
from .rng import mix

T = TypeVar("T")
Purpose = Literal["compute", "look", "change"]


class Place(NamedTuple):
    """Replica i of N and stage j of J, both counted from 0."""

    replica: int
    stage: int

    def __str__(self) -> str:
        return f"replica {self.replica} stage {self.stage}"


DRAINED = "/drained"  # ends the names of channels whose receiver takes all that has come whenever it takes something

computing: Place | None = None  # the worker whose function runs right now, for instruments (probes/)


class Beside(Protocol):
    """A program that goes on beside a worker's own. `done`: whether it is over by now. Await it for its result, or for what it
    raised."""

    @property
    def done(self) -> bool: ...

    def __await__(self) -> Generator[Any, None, Any]: ...


class Transport(Protocol):
    """What a world does for its workers. All methods are called by the worker at `here`. timed: whether acts take time on a
    clock of the world's own."""

    timed: bool

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None: ...

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor: ...

    async def arrived(self, here: Worker, there: Place, channel: str) -> int: ...

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]: ...

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]: ...

    def progress(self) -> None: ...

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor: ...

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]: ...

    async def reduce_scatter(self, here: Worker, channel: str, values: Tensor) -> Tensor: ...

    def beside(self, here: Worker, words: str, program: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Beside: ...

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any: ...

    async def until(self, here: Worker, when: float) -> None: ...

    async def give_way(self, here: Worker, turn: float) -> None: ...

    def now(self, here: Worker) -> float: ...

    def say_first(self, here: Worker, name: str, value: float) -> float: ...

    def record(
        self,
        here: Worker,
        kind: str,
        channel: str,
        size: int,
        there: Place | None,
        begin: float | None = None,
        *,
        waited: bool = False,
        wire: int = 0,
    ) -> None: ...

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> Any: ...


class Link:
    """The way to one neighbour: FIFO channels, told apart by name."""

    def __init__(self, here: Worker, there: Place) -> None:
        self._here, self._there = here, there

    async def send(self, channel: str, x: Tensor) -> None:
        """Put `x` on the channel. The sender must not change `x` afterwards."""
        await self._here.transport.send(self._here, self._there, channel, x)

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        """The oldest message of the channel not yet taken; waits for it. `like` hints at its shape, if known."""
        return await self._here.transport.recv(self._here, self._there, channel, like)

    async def arrived(self, channel: str) -> int:
        """How many messages of the channel could be taken now without waiting; it depends on who is faster."""
        return await self._here.transport.arrived(self._here, self._there, channel)

    async def swap(self, channel: str, x: Tensor) -> Tensor:
        """Send `x` and take what the neighbour sent on the same channel."""
        await self.send(channel, x)
        return await self.recv(channel, x)


class Source(Link):
    """Below stage 0: the data. Receiving gives the micro-batch's input; what is sent down to it is dropped."""

    def __init__(self) -> None:
        pass

    async def send(self, channel: str, x: Tensor) -> None:
        """Drop `x`: data need no gradient."""

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        """The input of the micro-batch given as `like`."""
        return like.x


class Sink(Link):
    """Above the last stage: nothing. What is sent up to it is dropped; receiving is a mistake of the method."""

    def __init__(self) -> None:
        pass

    async def send(self, channel: str, x: Tensor) -> None:
        """Drop `x`: nobody is above."""

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        """Raises UnlockedError: a method must not wait for a stage that does not exist."""
        raise UnlockedError(f"The last stage waits on channel {channel!r} for a stage above it; there is none.")


class GroupsBelow(Link):
    """All groups of the depth below: what they send is joined along channels, what is sent down is parted among them."""

    def __init__(self, here: Worker, stages: Sequence[int]) -> None:
        self._links = [Link(here, Place(here.replica, stage)) for stage in stages]
        self._channels: list[int] = []  # of each group

    async def send(self, channel: str, x: Tensor) -> None:
        """To each group its own channels of `x`."""
        for link, part in zip(self._links, x.split(self._channels, channel_axis(x)), strict=True):
            await link.send(channel, part.contiguous())

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        """What all groups sent, in their order."""
        parts = [await link.recv(channel, like) for link in self._links]
        self._channels = [part.shape[channel_axis(part)] for part in parts]
        return join(parts)

    async def arrived(self, channel: str) -> int:
        """How many messages have come from every group."""
        return min([await link.arrived(channel) for link in self._links])


class GroupsAbove(Link):
    """All groups of the depth above: each is sent the same, what comes back is added up in their order."""

    def __init__(self, here: Worker, stages: Sequence[int]) -> None:
        self._links = [Link(here, Place(here.replica, stage)) for stage in stages]

    async def send(self, channel: str, x: Tensor) -> None:
        """To every group."""
        for link in self._links:
            await link.send(channel, x)

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        """The sum of what the groups sent."""
        total = await self._links[0].recv(channel, like)
        for link in self._links[1:]:
            total = torch.add(total, await link.recv(channel, like))
        return total

    async def arrived(self, channel: str) -> int:
        """How many messages have come from every group."""
        return min([await link.arrived(channel) for link in self._links])


class Ready:
    """An exchange that has nothing to wait for."""

    def __init__(self, result: Sequence[Tensor]) -> None:
        self._result = result

    def __await__(self) -> Generator[Any, None, Sequence[Tensor]]:
        return self._result
        yield  # an awaitable is a generator, though this one never gives way


class Group:
    """The same stage in all replicas, this one included. `rank` is this replica, `size` is N."""

    def __init__(self, here: Worker, size: int) -> None:
        self._here, self.rank, self.size = here, here.replica, size

    async def mean(self, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Element-wise mean of each tensor over the replicas, summed in the order of the replicas. Read-only."""
        if self.size == 1:
            return tensors
        return await self._here.transport.mean(self._here, channel, tensors)

    def begin_mean(self, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """As `mean`, begun now and going on beside the program where the world can; await what is returned.

        May be called inside a computation. Exchanges begun at the same time need channels of different names; what follows a
        slash in a name tells them apart and is left out of the record.
        """
        if self.size == 1:
            return Ready(tensors)
        return self._here.transport.begin_mean(self._here, channel, tensors)

    def progress(self) -> None:
        """Let exchanges that were begun go on; may be called inside a computation."""
        self._here.transport.progress()

    async def take(self, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Entry i of the result is entry i of the `values` of replica `owners[rank, i]`.

        `values` has shape (k,), `owners` (N, k) int64, the same on every replica: so no index travels.
        """
        if self.size == 1:
            return values
        return await self._here.transport.take(self._here, channel, values, owners)

    async def gather(self, channel: str, x: Tensor) -> list[Tensor]:
        """Every replica's `x`, in the order of the replicas. Read-only."""
        if self.size == 1:
            return [x]
        return await self._here.transport.gather(self._here, channel, x)

    async def reduce_scatter(self, channel: str, values: Tensor) -> Tensor:
        """This replica's part of the sum of all `values` (k,), summed in the order of the replicas. Read-only.

        Replica r gets entries ⌊kr/N⌋ up to ⌊k(r+1)/N⌋; `gather` is the way back.
        """
        if self.size == 1:
            return values
        return await self._here.transport.reduce_scatter(self._here, channel, values)

    def peer(self, replica: int) -> Link:
        """The link to the same stage in another replica."""
        return Link(self._here, Place(replica, self._here.stage))


class Guard(Protocol):
    """What a consensus rule does around the computations of a worker."""

    async def before(self, kind: str) -> None:
        """A computation of this kind is about to begin."""

    async def after(self, kind: str) -> None:
        """It is over."""


class Worker:
    """One stage of one replica.

    Attributes: `replica` i of `replicas.size` N, `stage` j of `stages` J (from 0); `below`, `above`: neighbours in depth;
    `replicas`: the group; `device`: where it computes; `version`: updates of its weights so far; `reading`: the version
    that what runs now computes with, if that need not be the newest; `losses`: what `report` was given since the last step;
    `depth`, `group`, `siblings`: where it stands if several stages stand side by side (`arrange`);
    `own_below`, `own_above`: neighbours in the same replica, where a micro-batch's may be in others (`route`, by its number);
    `guard`: awaited around every computation, `lens`: entered around every computation, if a consensus rule wants that;
    `notes`: what `note` was given since the last step; `present`: see `at_hand`.
    """

    def __init__(
        self,
        transport: Transport,
        place: Place,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.transport, self.place, self.stages, self.seed = transport, place, stages, seed
        self.replica, self.stage = place
        self.device = device
        self.below: Link = Link(self, Place(self.replica, self.stage - 1)) if self.stage > 0 else Source()
        self.above: Link = Link(self, Place(self.replica, self.stage + 1)) if self.stage < stages - 1 else Sink()
        self.own_below, self.own_above = self.below, self.above
        self.layout, self.siblings = (1,) * stages, list[Place]()
        self.depth, self.group = self.stage, 0
        self.route: Callable[[int], tuple[Link, Link]] | None = None
        self.replicas = Group(self, replicas)
        self.version = 0
        self.reading: int | None = None
        self.losses: list[Tensor] = []
        self.notes: list[tuple[str, Tensor | float]] = []
        self.guard: Guard | None = None
        self.lens: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
        self.present: Callable[[Purpose], None] | None = None
        self._context = context
        self.at(0)
        self._generator = _default_generator(device)

    def arrange(self, layout: Layout) -> None:
        """Take the place that the chain's layout gives this stage, where groups stand side by side.

        `layout`: groups of each depth; `depth`, `group`: where it stands; `siblings`: the other groups of its depth.
        """
        self.layout, self.depth, row = layout.groups, layout.depth(self.stage), layout.beside(self.stage)
        self.group = self.stage - row[0]
        self.siblings = [Place(self.replica, stage) for stage in row if stage != self.stage]
        below, above = layout.row(self.depth - 1), layout.row(self.depth + 1)
        here = self.replica
        self.below = (
            GroupsBelow(self, below) if len(below) > 1 else Link(self, Place(here, below[0])) if below else Source()
        )
        self.above = (
            GroupsAbove(self, above) if len(above) > 1 else Link(self, Place(here, above[0])) if above else Sink()
        )
        self.own_below, self.own_above = self.below, self.above

    @property
    def first(self) -> bool:
        """Whether this is a stage that reads the data."""
        return self.depth == 0

    @property
    def last(self) -> bool:
        """Whether this is the stage with the network's own loss."""
        return self.stage == self.stages - 1

    @property
    def seen(self) -> int:
        """The version of the weights to write into the record of a computation."""
        return self.version if self.reading is None else self.reading

    def at(self, micro_batch: int, samples: int = 0) -> None:
        """Begin a micro-batch: what runs from now on is recorded under it and draws its random numbers."""
        self.micro_batch, self.samples, self._draws = micro_batch, samples, 0
        if self.route is not None:
            self.below, self.above = self.route(micro_batch)
        self._draw_seed = mix(self.seed, micro_batch) >> 1  # leaves room to count up

    def run(self, kind: str, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Compute `function(*arguments)` and record it as an act of this kind.

        Random numbers inside come from a seed made of (run seed, replica, stage, micro-batch, which call): dropout is the
        same in every world and after a resume.
        """
        if self.guard is None:
            return self.transport.execute(self, kind, function, arguments)
        return self._guarded(self.guard, kind, function, arguments)

    async def _guarded(self, guard: Guard, kind: str, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        await guard.before(kind)
        result = await self.transport.execute(self, kind, function, arguments)
        await guard.after(kind)
        return result

    def compute(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """For worlds: call the function under this worker's random seed and precision. Raises InvalidChoice for a micro-batch
        that is too small for BatchNorm, and whatever the function raises."""
        global computing
        computing = self.place
        try:
            if self._context is None and self.lens is None:
                return self.seeded(function, arguments)
            with contextlib.ExitStack() as stack:
                for enter in (self._context, self.lens):
                    if enter is not None:
                        stack.enter_context(enter())
                return self.seeded(function, arguments)
        except ValueError as error:
            from .batchnorm import refuse_one_sample  # late: it needs this file

            refuse_one_sample(
                error,
                f"Stage {self.stage} was given a micro-batch of one sample, but a BatchNorm in its body or its head needs two "
                "in training (most named heads have one). Give larger batches (batch_size) or fewer micro-batches "
                "(accumulate, micro_batches), or take a model and heads without BatchNorm.",
            )
            raise
        finally:
            computing = None

    def seeded(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Call the function under this worker's next random seed; what only moves tensors (`@work()`) draws nothing."""
        self.at_hand("compute")
        if getattr(function, "work", None) == ():
            return function(*arguments)
        self._draws += 1
        self._generator.manual_seed(self._draw_seed + self._draws)
        return function(*arguments)

    def leave_out(self) -> None:
        """Count a computation that is not done, so that those after it draw the same random numbers as if it were."""
        self._draws += 1

    def at_hand(self, purpose: Purpose = "look") -> None:
        """See to it that the stage's tensors are in memory, where they may be elsewhere (residency/). Computations do; others
        who look at them must, or are about to "change" them."""
        if self.present is not None:
            self.present(purpose)

    def random_state(self) -> Tensor:
        """The state of the random numbers that a computation draws from."""
        return self._generator.get_state()

    def set_random_state(self, state: Tensor) -> None:
        """Go on drawing from a state that `random_state` gave."""
        self._generator.set_state(state.cpu())

    async def until(self, when: float) -> None:
        """Wait until this worker's clock, counted in its own gradients since training began, is at `when`.

        In process, and under a virtual clock, those who wait for an earlier moment go on first; on real processes nobody waits.
        """
        await self.transport.until(self, when)

    async def give_way(self, turn: float) -> None:
        """Where workers take turns in a process without a clock: let those go first who are at an earlier turn."""
        await self.transport.give_way(self, turn)

    @property
    def now(self) -> float:
        """Seconds on a clock that all workers share: the world's own, or that of rank 0's machine."""
        return self.transport.now(self)

    def say_first(self, name: str, value: float) -> float:
        """The value that was given first under this name, by whichever worker; it depends on who is faster. Takes no time."""
        return self.transport.say_first(self, name, value)

    @property
    def own(self) -> Link:
        """From this program to those beside it: what is sent there, they take from the same link."""
        return Link(self, self.place)

    def beside(self, words: str, program: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Beside:
        """Begin `program(worker)` beside this one: it goes on while this one computes, as far as the world can.

        It is given this worker a second time, with the same verbs; nothing in it may draw random numbers or touch what this
        program works on. Its channels must have other names than this program's. `words`: what it does, for error messages.
        """
        return self.transport.beside(self, words, program)

    def report(self, loss: Tensor) -> None:
        """Hand over a loss (scalar, detached) for the books."""
        self.losses.append(loss)

    def note(self, name: str, value: Tensor | float) -> None:
        """Hand over another number worth watching (scalar, detached); the record of an epoch has its mean for each stage."""
        self.notes.append((name, value))

    def forget_reports(self) -> None:
        """Losses and notes handed over before are in the books, or of a step that failed."""
        self.losses.clear()
        self.notes.clear()


def _default_generator(device: torch.device | None) -> torch.Generator:
    if device is not None and device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
