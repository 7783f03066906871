"""All workers in this process under a virtual clock: computing costs seconds, messages cost latency and bytes/bandwidth.

The programs, the mailboxes and the meetings are those of the in-process world. What is new is when somebody goes on: workers
take turns in the order of the clock, a computation is charged what its stage's costs and its device's speed say
(simulation/costs.py, hardware.py), a message arrives when the network lets it (network.py). With tensors the numbers are those
of every other world, bit for bit; without, nothing is computed and programs handle shapes only (simulation/ghosts.py).

Nothing here looks at the wall clock: the same seed gives the same timeline, always.

Every worker's clock goes on from one `run` to the next. Inside a run what happens first on the clock is done first; between two
runs workers may be at different times, and wires that are busy stay so.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..chain import Chain
from ..cluster import Alone
from ..errors import Deadlock, DoesNotFit, InvalidChoice, UnlockedError
from ..rng import seed_of
from ..rules.mean import ordered_sum
from ..simulation.costs import Costs, costs_of, forward_of
from ..simulation.hardware import Hardware, SlowDowns
from ..simulation.memory import device_peaks
from ..simulation.network import FREE, Line, Wire
from ..simulation.profile import profile
from ..timeline import Act, Timeline
from ..work import USUAL, Work
from ..worker import Beside, Place, Worker
from .base import Program
from .beside import Companion, Spawned
from .clock import Clock, last, until
from .exchange import mean_bytes, scatter_bytes, take_bytes
from .in_process import mean_of_each, own_part
from .local import bytes_of, places, refuse_untaken, sizes
from .meeting import Meeting, MeetingKey, MeetingWorkers
from .placement import placement
from .scheduler import Wait

if TYPE_CHECKING:
    from ..credit.base import Credit


@dataclass
class _Computing:
    """The computation that is going on; `complete`: bytes of gradients whose exchange it has begun."""

    begin: float
    seconds: float
    parts: tuple[Work, ...]
    complete: int = 0


class Lasting:
    """A computation that takes so many seconds on a device of speed 1, whatever the costs say, and gives nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        """Nothing is computed."""


class Simulated(MeetingWorkers):
    """The world with a clock.

    Args:
        hardware: devices, speeds, slow-downs, network. Default: one device of 10⁹ operations per second for each worker, and a
            network that takes no time.
        costs: seconds and bytes of every stage, or what gives them for a chain. Default: read off the chain by counting its
            operations.
        tensors: False: nothing is computed; the programs are given ghosts (simulation/simulating.py).
        optimizer: whose state is counted where the costs are read off the chain.

    Raises DoesNotFit in `run` if the hardware's devices have a memory and a device would need more.
    """

    timed = True

    def __init__(
        self,
        hardware: Hardware | None = None,
        costs: Costs | Callable[[Chain], Costs | None] | None = None,
        *,
        tensors: bool = True,
        optimizer: str = "momentum",
    ) -> None:
        self._clock = Clock()
        super().__init__(self._clock)
        self.crew = Alone()
        self.hardware = hardware if hardware is not None else Hardware()
        self.credit: Credit | None = None  # whose micro-batches are held, if that is known
        self.costs: Costs | None = costs if isinstance(costs, Costs) else None
        self._costs_of = None if isinstance(costs, Costs) else costs
        self._tensors, self._optimizer = tensors, optimizer
        self._network, self._charged = self.hardware.network, True
        self._times: dict[Place, float] = {}
        self._wires: dict[Wire, float] = defaultdict(float)  # free from then on
        self._claimed: set[int] = set()  # devices that do something
        self._queues: dict[int, deque[object]] = defaultdict(deque)  # who waits for a device
        self._seconds_of: dict[tuple, float] = {}
        self._forwards: dict[tuple, Line] = {}  # of networks that are no stages
        self._samples: dict[Place, int] = {}  # of a micro-batch, as a rule
        self._odd: dict[tuple[Place, int], int] = {}  # of those that are larger or smaller
        self._slow: dict[Place, tuple[int, float]] = {}
        self._computing: _Computing | None = None
        self._stages: dict[Place, Any] = {}  # ghosts whose weights somebody waits for

    # ---- the mesh --------------------------------------------------------------------------------------------------

    def mesh(
        self,
        replicas: int | Sequence[int],
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """All workers of the mesh. Raises InvalidChoice (more devices than workers; costs of other stages)."""
        self._boxes.clear()  # messages left over for a mesh before
        self._first.clear()
        if self.costs is None:
            if chain is None:
                raise InvalidChoice("A simulated world needs costs, or a chain to read them off; give costs=.")
            given = None if self._costs_of is None else self._costs_of(chain)
            self.costs = given or costs_of(profile(chain), self.hardware.device, self._optimizer)
        if len(self.costs) != stages:
            raise InvalidChoice(
                f"The costs are of {len(self.costs)} stage(s), the network has {stages}; give costs of the same cut."
            )
        devices = self.hardware.devices
        size = sizes(replicas, stages)
        self.devices = placement(replicas, stages, sum(size) if devices is None else devices)
        return [
            Worker(self, place, size[place.stage], stages, seed_of(seed, "worker", *place), context, device)
            for place in places(replicas, stages)
        ]

    def haunt(self, stages: Mapping[Place, Any]) -> None:
        """Without tensors: the ghost stages, whose backward completes the gradients somebody waits for."""
        self._stages = {place: stage for place, stage in stages.items() if stage.awaited}

    # ---- running ---------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds on the clock of the worker that is furthest."""
        return max(self._times.values(), default=0.0)

    def state(self) -> dict[str, Any]:
        """The clocks of workers and wires, for a checkpoint."""
        return {
            "times": [[*place, when] for place, when in self._times.items()],
            "wires": [[list(wire), when] for wire, when in self._wires.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._times = {Place(replica, stage): when for replica, stage, when in state["times"]}
        self._wires = defaultdict(float, {tuple(wire): when for wire, when in state["wires"]})

    def run(
        self, programs: Iterable[tuple[Worker, Program]], charged: bool = True, *, partly: bool = False
    ) -> Timeline:
        """Run every worker's program to its end and return what happened, in simulated seconds.

        Raises what InProcess raises, and DoesNotFit. `charged=False`: it takes no time, and the clock stays. `partly`: those
        that all wait for each other end there, and messages may be left over.
        """
        self._timeline = Timeline()
        programs = list(programs)
        self._charged = charged
        self._network = self.hardware.network if charged else FREE
        now = self.clock()
        self._clock.start_at(
            (self._times.get(worker.place, 0.0) if charged else now, worker, self._to_the_end(worker, program))
            for worker, program in programs
        )
        try:
            with contextlib.nullcontext() if self._tensors else _no_garbage_collection():
                self._clock.run_ready()
            if not (partly or self._clock.idle):
                raise Deadlock(f"No worker can go on: {self._clock.stuck()}.")
            if not partly:
                refuse_untaken(self._boxes, self.crossing)
        except BaseException:
            self._boxes.clear()
            raise
        finally:
            self._clear()
            if partly:
                self._boxes.clear()
            for _, program in programs:  # of which some may not have begun
                program.close()
        if charged:
            self._check_memory()
        self._odd.clear()
        return self._timeline

    async def _to_the_end(self, worker: Worker, program: Program) -> None:
        await program
        if self._charged:
            self._times[worker.place] = self._clock.now

    def _clear(self) -> None:
        self._clock.close()
        self._forget_meetings()
        self._queues.clear()
        self._claimed.clear()
        self._computing = None

    def _check_memory(self) -> None:
        memory = self.hardware.device.memory
        if memory is None or self.costs is None:
            return
        samples = max([*self._samples.values(), *self._odd.values()], default=0)
        for device, peak in device_peaks(self._timeline, self.costs, samples, self.devices, self.credit).items():
            if peak > memory:
                here = ", ".join(str(place) for place, owner in self.devices.items() if owner == device)
                raise DoesNotFit(
                    f"Device {device} ({here}) would hold {peak:,} bytes at its peak, but has {memory:,}; "
                    "cut into more stages, give smaller batches, or another method."
                )

    def close(self) -> None:
        """Nothing to close."""

    # ---- computing -------------------------------------------------------------------------------------------------

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """Compute, or tell what would come out, and charge for it. What takes no time needs no device."""
        clock, place = self._clock, here.place
        device = self.devices[place]
        if kind == "F" and arguments:
            self._note_samples(here, _samples(arguments))
        seconds = self._seconds(here, kind, function, arguments, device) if self._charged else 0.0
        claims = seconds > 0.0 and not isinstance(here, Companion)  # what goes on beside a program needs no device
        if claims:
            if device in self._claimed:
                await self._turn(device)
            self._claimed.add(device)
        begin = clock.now
        end = begin + seconds
        self._timeline.acts.append(Act(kind, place[0], place[1], here.micro_batch, here.seen, 0, begin, end))
        self._computing = _Computing(begin, seconds, _parts(kind, function))
        result = here.compute(function, arguments) if self._tensors else self._tell(here, kind, function, arguments)
        self._computing = None
        if seconds > 0.0:
            await until(end)
        if claims:
            self._release(device)
        return result

    async def _turn(self, device: int) -> None:
        """Wait for a device that does something; first come, first served."""
        ticket = object()
        self._queues[device].append(ticket)
        await Wait(ticket, lambda: f"device {device}")

    def _release(self, device: int) -> None:
        """The device goes to whoever has waited longest."""
        queue = self._queues.get(device)
        if queue:
            self._clock.wake(queue.popleft())
        else:
            self._claimed.discard(device)

    def _tell(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """What would come out; a backward completes the gradients of its stage."""
        stage = self._stages.get(here.place)
        if stage is not None:
            for parameter in stage.reached(_parts(kind, function)):
                for hook in parameter.hooks:
                    hook(parameter)
        gives = getattr(function, "gives", None)
        if gives is None:
            return None
        owner = getattr(function, "__self__", None)
        return gives(*arguments) if owner is None else gives(owner, *arguments)

    def _seconds(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple, device: int) -> float:
        if type(function) is Lasting:
            return function.seconds / self.hardware.speed(device)
        parts = _parts(kind, function)
        samples = self._samples_of(here)
        key = (here.stage, parts, samples, device)
        seconds = self._seconds_of.get(key)
        if seconds is None:
            assert self.costs is not None
            seconds = self.costs[here.stage].of(parts, samples) / self.hardware.speed(device)
            self._seconds_of[key] = seconds
        if (network := getattr(function, "network", None)) is not None:
            seconds += self._forward(here.stage, network, arguments, samples) / self.hardware.speed(device)
        return seconds if self.hardware.slow_downs is None else seconds * self._slowed(here, self.hardware.slow_downs)

    def _forward(self, stage: int, asked: Callable[..., Any], arguments: tuple, samples: int) -> float:
        """Seconds of a forward of a network that is no stage (work.py), where those of stages are not made up."""
        assert self.costs is not None
        if not self.costs[stage].profile.flops:
            return 0.0
        network, like = asked(*arguments)
        key = (network, like.shape[1:], like.dtype)
        if key not in self._forwards:
            self._forwards[key] = forward_of(network, like, self.hardware.device)
        return self._forwards[key].at(samples)

    def _note_samples(self, here: Worker, samples: int) -> None:
        if self._samples.setdefault(here.place, samples) != samples:
            self._odd[here.place, here.micro_batch] = samples

    def _samples_of(self, here: Worker) -> int:
        """Of the micro-batch this worker is at."""
        usual = self._samples.get(here.place, 0)
        return self._odd.get((here.place, here.micro_batch), usual) if self._odd else usual

    def _slowed(self, here: Worker, slow_downs: SlowDowns) -> float:
        """The factor of this worker for this micro-batch, drawn once."""
        known = self._slow.get(here.place)
        if known is None or known[0] != here.micro_batch:
            known = self._slow[here.place] = (
                here.micro_batch,
                slow_downs.of(here.replica, here.stage, here.micro_batch),
            )
        return known[1]

    async def _busy(self, here: Worker, seconds: float) -> None:
        """The worker's device handles a message."""
        if seconds <= 0.0:
            return
        device = self.devices[here.place]
        if isinstance(here, Companion):
            await until(self._clock.now + seconds / self.hardware.speed(device))
            return
        if device in self._claimed:
            await self._turn(device)
        self._claimed.add(device)
        await until(self._clock.now + seconds / self.hardware.speed(device))
        self._release(device)

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Onto the wire as soon as it is free; the sender goes on once it has handed the message over."""
        size, begin = bytes_of(x), self._clock.now
        key = (here.place, there, channel)
        if there == here.place and size == 0:  # a word to what goes on beside it
            self._boxes[key].append((begin, x))
            self._clock.wake_at(key, begin)
            return
        await self._busy(here, self._network.send.at(size))
        arrival = self._arrival(self.devices[here.place], self.devices[there], size)
        self._act(here, "S", channel, size, there, begin)
        self._boxes[key].append((arrival, x))
        self._clock.wake_at(key, arrival)

    def _arrival(self, source: int, target: int, size: int) -> float:
        now, network = self._clock.now, self._network
        if source == target or network is FREE:
            return now
        edge, wire = network.between(source, target), network.wire(source, target)
        left = self._wires[wire] = max(now, self._wires[wire]) + edge.seconds(size)
        return left + edge.latency

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """The oldest message, once it has arrived; the act lasts as long as the worker waited for it."""
        begin = self._clock.now
        key = (there, here.place, channel)
        box = self._boxes[key]
        while not box:
            await Wait(key, lambda: f"channel {channel!r} from {there}")
        arrival, x = box[0]
        if arrival > self._clock.now:
            await until(arrival)
        box.popleft()
        size = bytes_of(x)
        if there == here.place and size == 0:
            return x
        await self._busy(here, self._network.receive.at(size))
        self._act(here, "R", channel, size, there, begin)
        return x

    async def arrived(self, here: Worker, there: Place, channel: str) -> int:
        """As many as have arrived by the end of this moment: what comes at the same time is there."""
        await last()
        return sum(arrival <= self._clock.now for arrival, _ in self._boxes[(there, here.place, channel)])

    async def until(self, here: Worker, when: float) -> None:
        """Until the time that `when` gradients take on the devices of this replica, after all else that happens then."""
        assert self.costs is not None
        samples = here.samples or self._samples_of(here)
        gradient = sum(
            stage.of(("forward", "backward"), samples) / self._speed_of(Place(here.replica, j))
            for j, stage in enumerate(self.costs.stages)
        )
        if self._charged and when * gradient > self._clock.now:
            await until(when * gradient)
        await last()

    def now(self, here: Worker) -> float:
        """What the clock says."""
        return self._clock.now

    def _speed_of(self, place: Place) -> float:
        """Of the worker there, or of a usual device where the stage has fewer workers."""
        return self.hardware.speed(self.devices[place]) if place in self.devices else 1.0

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The mean, when the slowest member has come and the exchange has gone round."""
        size = sum(map(bytes_of, tensors))
        sent = mean_bytes(tensors, here.replica, here.replicas.size)
        if self._tensors:
            return await self._exchange(here, channel, (tensors, size), sent, lambda rows: mean_of_each(_only(rows)))
        await self._exchange(here, channel, (None, size), sent, _nothing)
        return tensors

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """The mean, begun when the computation that is going on has got so far, beside it."""
        begin = self._clock.now
        if self._computing is not None:
            self._computing.complete += sum(map(bytes_of, tensors))
            begin = self._moment(here, self._computing)

        async def later() -> Sequence[Tensor]:
            await until(begin)
            return await self.mean(here, channel, tensors)

        return self._scheduler.spawn(here, later(), lambda: f"the exchange {channel!r}")

    def _moment(self, here: Worker, computing: _Computing) -> float:
        """When the computation that goes on has completed so many bytes of gradients."""
        assert self.costs is not None
        costs, samples = self.costs[here.stage], self._samples_of(here)
        whole = costs.of(computing.parts, samples)
        share = costs.moment(computing.parts, samples, computing.complete) / whole if whole else 1.0
        return computing.begin + share * computing.seconds

    def progress(self) -> None:
        """What goes on beside a computation needs no help here."""

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Only entries whose owner is another replica travel. Without tensors: the share of them to be expected."""
        rank, size = here.replicas.rank, here.replicas.size
        if not self._tensors:
            sent = bytes_of(values) * (size - 1) // size
            await self._exchange(here, channel, (None, sent), sent, _nothing, spread=True)
            return values
        sent = take_bytes(values, owners, rank)
        rows = await self._exchange(
            here, channel, (values, sent), sent, lambda rows: torch.stack(_only(rows)), spread=True
        )
        return rows.gather(0, owners[rank : rank + 1]).squeeze(0)

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor; each worker sends its own to N−1 others."""
        sent = (here.replicas.size - 1) * bytes_of(x)
        return await self._exchange(here, channel, (x, sent), sent, _only, spread=True)

    async def reduce_scatter(self, here: Worker, channel: str, values: Tensor) -> Tensor:
        """This replica's part of the sum, when the slowest member has come; each worker sends all but its own."""
        rank, size = here.replica, here.replicas.size
        sent = scatter_bytes(values, rank, size)
        if not self._tensors:
            await self._exchange(here, channel, (None, sent), sent, _nothing, spread=True)
            return own_part(values, rank, size)
        total = await self._exchange(
            here, channel, (values, sent), sent, lambda rows: ordered_sum(_only(rows)), spread=True
        )
        return own_part(total, rank, size)

    def beside(self, here: Worker, words: str, program: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Beside:
        """At the same time on the clock; what it computes takes its time, but no device's."""
        return Spawned(self._scheduler, here, words, program(Companion(here, self)))

    async def _exchange(
        self,
        here: Worker,
        channel: str,
        brought: tuple[Any, int],
        sent: int,
        join: Callable[[list[Any]], Any],
        spread: bool = False,
    ) -> Any:
        """Meet; it takes what the largest payload brought takes: spread over the others, or as a mean."""
        begin = self._clock.now

        def joined(rows: list[tuple[Any, int]]) -> tuple[Any, int, bool]:
            return join(rows), max(row[1] for row in rows), spread

        result = await self._meet(here, channel, brought, joined)
        await self._busy(here, self._network.exchange.at(sent))
        self._act(here, "M", channel, sent, None, begin)
        return result[0]

    async def _hold(self, here: Worker, key: MeetingKey, meeting: Meeting) -> None:
        """All have come: the exchange begins when the members' wires are free."""
        _, size, spread = meeting.result
        network = self._network
        over = self._clock.now
        members = list(dict.fromkeys(self.devices[Place(r, here.stage)] for r in range(here.replicas.size)))
        if network is not FREE and len(members) > 1:
            wires = {network.wire(a, b) for a, b in zip(members, [*members[1:], members[0]])}
            seconds = network.spread_seconds(size, members) if spread else network.mean_seconds(size, members)
            over = max(over, *(self._wires[wire] for wire in wires)) + seconds
            for wire in wires:
                self._wires[wire] = over
        self._clock.wake_at(key, over)
        await until(over)

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> Any:
        """Raises UnlockedError: rules that leave the communicating to PyTorch cannot be simulated."""
        raise UnlockedError(
            "PyTorch's own parallel training communicates by itself, so it cannot be simulated; "
            "use the distributed world (unlocked launch --processes …)."
        )

    def _act(self, here: Worker, kind: str, channel: str, size: int, there: Place | None, begin: float) -> None:
        place = here.place
        self._timeline.acts.append(
            Act(
                kind,
                place[0],
                place[1],
                here.micro_batch,
                here.version,
                size,
                begin,
                self._clock.now,
                channel.partition("/")[0],
                there,
            )
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of acts hold no cycles, and looking through them for some takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parts(kind: str, function: Callable[..., Any]) -> tuple[Work, ...]:
    """What a computation consists of."""
    parts = getattr(function, "work", None)
    return parts if type(parts) is tuple else USUAL.get(kind, ())  # a module may have an attribute of that name


def _samples(arguments: tuple) -> int:
    """Samples of the first tensor among the arguments."""
    for x in arguments:
        shape = getattr(x, "shape", None)
        if shape is not None:
            return shape[0] if len(shape) else 1
    return 0


def _nothing(rows: list[Any]) -> None:
    return None


def _only(rows: list[tuple[Any, int]]) -> list[Any]:
    return [row[0] for row in rows]
