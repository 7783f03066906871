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
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..cluster import Cluster
from ..errors import InvalidChoice, LostProcess, UnlockedError, choose
from ..links import Door, GroupReceiver, GroupSender, RingSender
from ..links.process_group import pair_group
from ..rng import seed_of
from ..timeline import Timeline
from ..worker import Place, Worker
from . import exchange
from .backend import Reduced
from .base import Program
from .local import Key, LocalWorkers, bytes_of, on
from .placement import placement

Links = Literal["auto", "shared-memory", "gloo"]
Reduction = Literal["ordered", "backend"]
_TOLD_WITHIN = 3.0  # seconds
_ROOM = 2  # messages of a channel that may lie here untaken


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
        choose("kind of links", links, ("auto", "shared-memory", "gloo"))
        choose("reduction", reduction, ("ordered", "backend"))
        if ahead < 1:
            raise InvalidChoice(f"ahead={ahead} is not possible; a process must be allowed at least 1 window.")
        self.crew = cluster if cluster is not None else Cluster.join()
        self._own_cluster = cluster is None
        self._name = f"world-{self.crew.count_worlds()}"
        self._links, self._ahead, self._reduction = links, ahead, reduction
        self._window = 0
        self._ranks: dict[Place, int] = {}
        self._events: queue.SimpleQueue[tuple[Key, Tensor] | str | None] = queue.SimpleQueue()
        self._room: dict[Key, threading.Semaphore] = {}
        self._senders: dict[Key, RingSender | GroupSender] = {}
        self._receivers: dict[Key, GroupReceiver] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if links == "shared-memory" and len(set(self.crew.hosts)) > 1:
            raise InvalidChoice(
                "links='shared-memory' joins processes of one host, but these are on several; give 'auto'."
            )
        self._door = Door(self._open_channel)
        self._doors: list[str] = self.crew.share(self._door.address)
        self._running = False  # inside `run`
        self.crew.on_failure(self._events.put)
        self.crew.on_failure(self._abandon)

    def __enter__(self) -> Distributed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def mesh(
        self,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
    ) -> list[Worker]:
        """The workers placed on this process. Raises InvalidChoice (more processes than workers), CannotJoin."""
        self.crew.agree({"replicas": replicas, "stages": stages, "seed": seed}, "the mesh")
        ranks = placement(replicas, stages, self.crew.size)
        if self._ranks and self._ranks != ranks:
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

    def run(self, programs: Iterable[tuple[Worker, Program]]) -> Timeline:
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
            if (
                self._groups and (sentence := self._who_is_lost()) is not None
            ):  # torch only says that a connection broke
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
        for sender in list(self._senders.values()):
            while (oldest := sender.oldest) is not None and oldest <= limit:
                self._handle(self._wait_for_event())

    def _wait_for_event(self) -> tuple[Key, Tensor] | str | None:
        vitals = self.crew.vitals
        vitals.words = self._scheduler.stuck
        vitals.waiting = True
        try:
            return self._events.get()
        finally:
            vitals.waiting = False
            vitals.activity += 1

    def _handle(self, event: tuple[Key, Tensor] | str | None) -> None:
        """A message has arrived, or something was sent (None), or a process is lost (a sentence)."""
        if isinstance(event, str):
            raise LostProcess(event)
        if event is not None:
            self.crew.vitals.got += 1
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
            store=dist.PrefixStore(f"{self._name}/torch/", self.crew.another_store()),
            rank=self.crew.rank,
            world_size=self.crew.size,
        )

    # ---- links -----------------------------------------------------------------------------------------------------

    def _put(self, here: Worker, there: Place, channel: str, x: Tensor) -> int:
        """Send without waiting; returns the bytes on the wire, 0 inside a process."""
        key = (here.place, there, channel)
        if self._ranks[there] == self.crew.rank:
            self._deliver(key, x)
            return 0
        if key not in self._senders:
            self._senders[key] = self._open_sender(key)
        self.crew.vitals.sent += 1
        return self._senders[key].put(x, self._window)

    async def _get(self, here: Worker, there: Place, channel: str) -> Tensor:
        key = (there, here.place, channel)
        if not self._shared(self._ranks[there]) and key not in self._receivers:
            self._receivers[key] = self._open_receiver(key)
        x = await self._take(key)
        if key in self._room:
            self._room[key].release()
        return on(here.device, x)

    def _shared(self, rank: int) -> bool:
        """Whether messages from and to this rank go through memory."""
        if rank == self.crew.rank or self._links == "shared-memory":
            return True
        return self._links == "auto" and self.crew.hosts[rank] == self.crew.hosts[self.crew.rank]

    def _open_sender(self, key: Key) -> RingSender | GroupSender:
        rank = self._ranks[key[1]]
        lost = self._loss_of(rank)
        if self._shared(rank):
            return RingSender(self._doors[rank], [self.crew.rank, *key], lost, self._sent)
        return GroupSender(lambda: self._pair(key, 0), lost, self._sent)

    def _open_receiver(self, key: Key) -> GroupReceiver:
        self._room[key] = threading.Semaphore(_ROOM)
        return GroupReceiver(
            lambda: self._pair(key, 1), lambda x: self._arrived(key, x), self._loss_of(self._ranks[key[0]])
        )

    def _open_channel(self, told: Any) -> tuple[Callable[[Tensor], None], Callable[[str], None]]:
        """A process of this host opens a channel; called on a thread."""
        rank, source, target, channel = told
        key = (Place(*source), Place(*target), str(channel))
        self._room[key] = threading.Semaphore(_ROOM)
        return lambda x: self._arrived(key, x), self._loss_of(rank)

    def _arrived(self, key: Key, x: Tensor) -> None:
        """On a receiving thread: hand over, unless too many lie there already."""
        self._room[key].acquire()
        self._events.put((key, x))

    def _sent(self) -> None:
        self._events.put(None)

    def _loss_of(self, rank: int) -> Callable[[str], None]:
        return lambda how: self.crew.suspect(rank, how)

    def _pair(self, key: Key, side: int) -> dist.ProcessGroup:
        (a, b), (c, d), channel = key
        return pair_group(
            self.crew.another_store(), f"{self._name}/{a}.{b}/{c}.{d}/{channel}", side, self.crew.interface.address
        )

    def close(self) -> None:
        """Leave together with the others; without them, if the run has failed."""
        well = self.crew.failure is None
        links: list[Any] = [*self._senders.values(), *self._receivers.values(), self._door]
        with contextlib.suppress(LostProcess):
            if well:
                self.crew.barrier()  # everything sent has been taken
        for link in links:
            link.closing()  # from here on an end is no loss
        with contextlib.suppress(LostProcess):
            if well:
                self.crew.barrier()
        for link in links:
            if well or not isinstance(
                link, GroupSender | GroupReceiver
            ):  # a gloo thread may sit where nothing wakes it
                link.close()
        if dist.is_initialized() and self._groups and well:
            dist.destroy_process_group()
        if self._own_cluster:
            self.crew.close()


class _Member:
    """A worker's part in an exchange of its group."""

    def __init__(self, world: Distributed, here: Worker, channel: str) -> None:
        self._world, self._here, self._channel = world, here, channel
        self.rank, self.size, self.wire = here.replica, here.replicas.size, 0

    def put(self, to: int, x: Tensor) -> None:
        self.wire += self._world._put(self._here, Place(to, self._here.stage), self._channel, x)

    def get(self, source: int) -> Awaitable[Tensor]:
        return self._world._get(self._here, Place(source, self._here.stage), self._channel)
