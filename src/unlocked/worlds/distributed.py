"""Workers on several processes, of one host or many: the same programs, the same numbers, really in parallel.

A process keeps the workers placed on it interleaved, as InProcess does. A message to a worker elsewhere goes into a link
(links/) without waiting; a thread receives what comes, and a program that waits for it is woken. Processes of one host use
shared memory, others gloo. The exchanges of a group are programs over the same links (exchange.py).

A process may be ahead of another by a bounded number of windows: before it begins window w, all it sent up to window w − ahead
must have left. Inside a window nothing bounds the messages, so a method that ends in process ends here.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..chain import Chain
from ..cluster import Cluster
from ..errors import InvalidChoice, LostProcess, UnlockedError, choose
from ..rng import seed_of
from ..timeline import Timeline
from ..worker import Place, Worker
from . import exchange
from .backend import Reduced
from .base import Program
from .local import LocalWorkers, bytes_of, on
from .placement import placement
from .wiring import Event, Links, Wiring, described

Reduction = Literal["ordered", "backend"]
_TOLD_WITHIN = 3.0  # seconds


class Distributed(LocalWorkers):
    """The world of several processes.

    Args:
        cluster: this process among them, closed by whoever made it; None: joined now, as the starter's environment says.
        links: "auto" (shared memory where two processes share a host, gloo elsewhere) or one of them for all.
        ahead: windows (steps) a process may be ahead of what it has sent, ≥ 1.
        reduction: who computes a mean over replicas. "ordered": the library, summing in the order of the replicas, bit for bit
            as in process. "backend": gloo's or NCCL's own all-reduce, in whatever order it likes: the sum of N values is then
            good to about N units in the last place (equal bit for bit for N = 2), and every worker needs a process.

    `close` it at the end, or use it as a context manager. Raises CannotJoin, LostProcess.
    """

    def __init__(
        self, cluster: Cluster | None = None, *, links: Links = "auto", ahead: int = 2, reduction: Reduction = "ordered"
    ) -> None:
        super().__init__()
        choose("reduction", reduction, ("ordered", "backend"))
        if ahead < 1:
            raise InvalidChoice(f"ahead={ahead} is not possible; a process must be allowed at least 1 window.")
        self.crew = cluster if cluster is not None else Cluster.join()
        self._own_cluster = cluster is None
        self._name = f"world-{self.crew.count_worlds()}"
        self._ahead, self._reduction, self._window = ahead, reduction, 0
        self._ranks: dict[Place, int] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._wiring = Wiring(self.crew, self._name, links)
        self._events = self._wiring.events
        self._running = False  # inside `run`
        self.crew.on_failure(self._events.put)
        self.crew.on_failure(self._abandon)

    def __enter__(self) -> Distributed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.close()
        except UnlockedError:
            if kind is None:  # else that is what matters
                raise

    def mesh(
        self,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """The workers placed on this process. Raises InvalidChoice (more processes than workers), CannotJoin."""
        self.crew.agree(
            {"replicas": replicas, "stages": stages, "seed": seed, "reduction": self._reduction}, "the mesh"
        )
        ranks = placement(replicas, stages, self.crew.size)
        if self._ranks and (self._ranks != ranks or self.crossing):
            raise UnlockedError("This world has another mesh already; make another world for this one.")
        self._ranks = ranks
        for rank, member in enumerate(self.crew.members):
            here = [str(place) for place, owner in self._ranks.items() if owner == rank]
            member["workers"] = ": " + ", ".join(here)
        workers = [
            Worker(self, place, replicas, stages, seed_of(seed, "worker", *place), context, device)
            for place, rank in self._ranks.items()
            if rank == self.crew.rank
        ]
        if self._reduction == "backend" and replicas > 1:
            self.process_group(workers[0], "replicas")  # now, when all come to it: later some would wait for others
        return workers

    @property
    def ranks(self) -> dict[Place, int]:
        """The process of every worker."""
        return dict(self._ranks)

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, programs: Iterable[tuple[Worker, Program]], charged: bool = True) -> Timeline:
        """Run the programs of the workers here to their ends; returns what they did, on this process's clock.

        Raises LostProcess when another process is gone, stuck or failed, and whatever a program raises: the other
        processes are told and stop as well. Nothing can be run after that.
        """
        self._timeline = Timeline()
        self._window += 1
        self._running = True
        self._scheduler.start(programs)
        try:
            self._hold_back()
            self._scheduler.run_ready()
            while not self._scheduler.idle:
                self._handle(self._wait_for_event())
                self._scheduler.run_ready()
        except LostProcess:
            raise
        except RuntimeError as error:
            # torch only says that a connection broke
            if self._groups and (sentence := self._who_is_lost()) is not None:
                raise LostProcess(sentence) from error
            self.crew.fail(error)
            raise
        except BaseException as error:
            self.crew.fail(error)
            raise
        finally:
            self._running = False
            self._scheduler.close()
        return self._timeline

    def clock(self) -> float:
        """Seconds of wall clock."""
        return time.perf_counter()

    def _who_is_lost(self) -> str | None:
        """The sentence about a lost process, if one comes within a few seconds (the launcher, or silence, tells)."""
        deadline = time.monotonic() + _TOLD_WITHIN
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
                if isinstance(event, str):
                    return event
        return None

    def _abandon(self, sentence: str) -> None:
        """On the heartbeat's thread: a wait inside torch cannot be woken, so a process still in one soon ends here."""
        if not self._groups:
            return
        time.sleep(_TOLD_WITHIN)
        if self._running:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            os._exit(1)

    def _hold_back(self) -> None:
        """Wait until what was sent in windows long past has left."""
        limit = self._window - self._ahead
        for oldest in self._wiring.oldest():
            while (window := oldest()) is not None and window <= limit:
                self._handle(self._wait_for_event())

    def _wait_for_event(self) -> Event:
        vitals = self.crew.vitals
        vitals.words = self._scheduler.stuck
        vitals.waiting = True
        try:
            return self._events.get()
        finally:
            vitals.waiting = False
            vitals.activity += 1

    def _handle(self, event: Event) -> None:
        """A message has arrived, or something was sent (None), or a process is lost (a sentence)."""
        if isinstance(event, str):
            raise LostProcess(event)
        if event is not None:
            self._wiring.arrived(event[0])
            self._deliver(*event)

    def progress(self) -> None:
        """Let exchanges go on that were begun beside a computation; called from inside it."""
        while not self._events.empty():
            self._handle(self._events.get())
        self._scheduler.run_tasks()

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Into the link or, if the other lives here, into its mailbox; never waits."""
        begin = time.perf_counter()
        wire = self._put(here, there, channel, x)
        self.record(here, "S", channel, bytes_of(x), there, begin, waited=True, wire=wire)

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """The oldest message; the act lasts as long as the worker waited for it."""
        begin = time.perf_counter()
        x = await self._get(here, there, channel)
        self.record(here, "R", channel, bytes_of(x), there, begin, waited=True)
        return x

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Mean over the replicas, wherever they live."""
        if self._reduction == "backend":
            return await self._backend_mean(here, channel, tensors)
        begin, member = time.perf_counter(), _Member(self, here, channel)
        means = await exchange.mean(member, tensors)
        size = exchange.mean_bytes(tensors, here.replica, here.replicas.size)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return means

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """The mean, begun now and going on beside the program."""
        if self._reduction == "backend":
            return self._backend_mean(here, channel, tensors)
        return self._scheduler.spawn(here, self.mean(here, channel, tensors), lambda: f"the exchange {channel!r}")

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Only entries whose owner is another replica travel."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        taken = await exchange.take(member, values, owners)
        size = exchange.take_bytes(values, owners, here.replica)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return taken

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor, in the order of the replicas."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        rows = await exchange.gather(member, x)
        size = (here.replicas.size - 1) * bytes_of(x)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return rows

    def _backend_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Reduced:
        """As the backend sums; begun at once."""
        group = self.process_group(here, "replicas")
        reduced = Reduced(tensors, group)
        size = exchange.mean_bytes(tensors, here.replica, here.replicas.size)
        self.record(here, "M", channel, size, None, wire=size)
        return reduced

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> dist.ProcessGroup:
        """torch's process group of this replica's stages, or of this stage's replicas, in order.

        For rules that let PyTorch do the communicating. Raises UnlockedError unless every worker has a process of its own.
        """
        if len(set(self._ranks.values())) < len(self._ranks):
            raise UnlockedError(
                f"PyTorch's own communication wants a process for each of the {len(self._ranks)} workers, but there are "
                f"{self.crew.size}; start {len(self._ranks)}."
            )
        if not dist.is_initialized():
            self._initialise_torch()
        which = "replica" if axis == "stages" else "stage"
        ranks = [rank for place, rank in self._ranks.items() if getattr(place, which) == getattr(here.place, which)]
        if tuple(ranks) not in self._groups:
            self._groups[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
        return self._groups[tuple(ranks)]

    def _initialise_torch(self) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", self.crew.interface.name)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"{self._name}/torch/", self.crew.own_store()),
            rank=self.crew.rank,
            world_size=self.crew.size,
        )

    # ---- messages --------------------------------------------------------------------------------------------------

    def _put(self, here: Worker, there: Place, channel: str, x: Tensor) -> int:
        """Send without waiting; returns the bytes on the wire, 0 inside a process."""
        key, rank = (here.place, there, channel), self._ranks[there]
        if rank == self.crew.rank:
            self._deliver(key, x)
            return 0
        return self._wiring.put(key, rank, x, self._window)

    async def _get(self, here: Worker, there: Place, channel: str) -> Tensor:
        key, rank = (there, here.place, channel), self._ranks[there]
        if rank != self.crew.rank:
            self._wiring.listen(key, rank)
        x = await self._take(key)
        self._wiring.taken(key)
        return on(here.device, x)

    def close(self) -> None:
        """Leave together with the others; without them, if the run has failed.

        Raises UnlockedError if a message was never taken (on another channel than the `crossing` ones): the method's sends
        and receives do not match.
        """
        well = self.crew.failure is None
        left: list[str] = []
        with contextlib.suppress(LostProcess):
            if well:
                left = self._wiring.missing(self.crossing)  # also a barrier: everything that was to be taken has been
                left += [
                    f"{len(box)} on {described(key)}"
                    for key, box in self._boxes.items()
                    if box and key[2] not in self.crossing
                ]
        self._wiring.closing()
        with contextlib.suppress(LostProcess):
            if well:
                self.crew.barrier()
        self._wiring.close(well)
        if dist.is_initialized() and self._groups and well:
            dist.destroy_process_group()
        self.crew.no_listener(self._events.put, self._abandon)
        if self._own_cluster:
            self.crew.close()
        if left:
            raise UnlockedError(
                f"Messages were never taken: {'; '.join(left)}. The method's sends and receives do not match."
            )


class _Member:
    """A worker's part in an exchange of its group."""

    def __init__(self, world: Distributed, here: Worker, channel: str) -> None:
        self._world, self._here, self._channel = world, here, channel
        self.rank, self.size, self.wire = here.replica, here.replicas.size, 0

    def put(self, to: int, x: Tensor) -> None:
        self.wire += self._world._put(self._here, Place(to, self._here.stage), self._channel, x)

    def get(self, source: int) -> Awaitable[Tensor]:
        return self._world._get(self._here, Place(source, self._here.stage), self._channel)
