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
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..chain import Chain
from ..cluster import Cluster
from ..cluster.elastic import Members
from ..errors import InvalidChoice, LostPeer, LostProcess, UnlockedError, choose
from ..rng import seed_of
from ..timeline import Timeline
from ..worker import Beside, Place, Worker
from . import exchange
from .backend import Reduced
from .base import Program
from .beside import Loss, SideThread, Threaded
from .local import sizes
from .placement import placement
from .scheduler import Moment
from .wired import Wired
from .wiring import Event, Links, Wiring

Reduction = Literal["ordered", "backend"]
_TOLD_WITHIN = 3.0  # seconds


class Distributed(Wired):
    """The world of several processes.

    Args:
        cluster: this process among them, closed by whoever made it; None: joined now, as the starter's environment says.
        links: "auto" (shared memory where two processes share a host, gloo elsewhere) or one of them for all.
        ahead: windows (steps) a process may be ahead of what it has sent, ≥ 1.
        reduction: who computes a mean over replicas. "ordered": the library, summing in the order of the replicas, bit for bit
            as in process. "backend": gloo's or NCCL's own all-reduce, in whatever order it likes: the sum of N values is then
            good to about N units in the last place (equal bit for bit for N = 2), and every worker needs a process.
        slow: stage → factor ≥ 1: every computation of that stage takes so many times as long, by sleeping, as on a slower
            machine (its process does nothing else meanwhile). For experiments.

    `close` it at the end, or use it as a context manager. Raises CannotJoin, LostProcess.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        links: Links = "auto",
        ahead: int = 2,
        reduction: Reduction = "ordered",
        slow: Mapping[int, float] | None = None,
    ) -> None:
        choose("reduction", reduction, ("ordered", "backend"))
        if ahead < 1:
            raise InvalidChoice(f"ahead={ahead} is not possible; a process must be allowed at least 1 window.")
        if any(not factor >= 1.0 for factor in (slow or {}).values()):
            raise InvalidChoice(f"slow={slow!r} is not possible; give a factor of at least 1 for a stage.")
        self._slow = dict(slow or {})
        crew = cluster if cluster is not None else Cluster.join()
        self._own_cluster = cluster is None
        self._name = f"world-{crew.count_worlds()}"
        super().__init__(crew, Wiring(crew, self._name, links))
        self._ahead, self._reduction, self._window = ahead, reduction, 0
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.events = self.wiring.events
        self.waits, self._waiting_lock = False, threading.Lock()
        self._side = SideThread(self)
        self._running = False  # inside `run`
        self.free_running = False  # whether programs can do without a process that is lost
        self.crew.on_failure(self.events.put)
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
        replicas: int | Sequence[int],
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """The workers placed on this process. Raises InvalidChoice (more processes than workers), CannotJoin."""
        self.crew.agree(
            {"replicas": str(replicas), "stages": stages, "seed": seed, "reduction": self._reduction}, "the mesh"
        )
        ranks = placement(replicas, stages, self.crew.size)
        if self._ranks and (self._ranks != ranks or self.crossing):
            raise UnlockedError("This world has another mesh already; make another world for this one.")
        self._ranks = ranks
        self.meshes += 1
        for rank, member in enumerate(self.crew.members):
            here = [str(place) for place, owner in self._ranks.items() if owner == rank]
            member["workers"] = ": " + ", ".join(here)
        size = sizes(replicas, stages)
        workers = [
            Worker(self, place, size[place.stage], stages, seed_of(seed, "worker", *place), context, device)
            for place, rank in self._ranks.items()
            if rank == self.crew.rank
        ]
        if self._reduction == "backend" and size[workers[0].stage] > 1:
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
            self._refuse_lost()
            self._hold_back()
            self._scheduler.run_ready()
            while not self._scheduler.idle:
                self._handle(self._wait_for_event())
                self._scheduler.run_ready()
            self._side.refuse_running()
        except (LostProcess, LostPeer):
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

    def _refuse_lost(self) -> None:
        """A loss that was no matter while programs ran freely, or came between two runs, is one now."""
        if self.crew.elastic is not None and self.crew.elastic.lost and not self.free_running:
            raise LostProcess(next(iter(self.crew.elastic.lost.values())))

    def clock(self) -> float:
        """Seconds of wall clock."""
        return time.perf_counter()

    def _who_is_lost(self) -> str | None:
        """The sentence about a lost process, if one comes within a few seconds (the launcher, or silence, tells)."""
        deadline = time.monotonic() + _TOLD_WITHIN
        with contextlib.suppress(queue.Empty):
            while True:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
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

    def be_elastic(self, members: Members) -> None:
        """The loss of a process is an event, not a failure."""
        members.on_loss(self._lost)

    def _lost(self, rank: int, sentence: str) -> None:
        """On some thread."""
        self.wiring.side_events.put(Loss(rank, sentence))
        self.events.put(Loss(rank, sentence))

    def leave(self) -> None:
        """Close without the others, who are on their way to the next generation."""
        self.crew.failure = self.crew.failure or "The members of this run have changed."
        self.close()

    @property
    def window(self) -> int:
        """How many have been run."""
        return self._window

    def _hold_back(self) -> None:
        """Wait until what was sent in windows long past has left."""
        limit = self._window - self._ahead
        for oldest in self.wiring.oldest():
            while (window := oldest()) is not None and window <= limit:
                self._handle(self._wait_for_event())

    def _wait_for_event(self) -> Event:
        self.crew.vitals.words = self._words
        self.idles(self, True)
        try:
            return self.events.get()
        finally:
            self.idles(self, False)

    def idles(self, thread: Distributed | SideThread, waits: bool) -> None:
        """One of the threads begins or ends to wait: the process waits while both do."""
        vitals = self.crew.vitals
        with self._waiting_lock:
            thread.waits = waits
            vitals.waiting = self.waits and self._side.waits
            vitals.activity += not waits

    def _words(self) -> str:
        return "; ".join(filter(None, (self._scheduler.stuck(), self._side.words())))

    def _handle(self, event: Event) -> None:
        """A message has arrived, something was sent (None), a program beside is over, or a process is lost (a sentence)."""
        if isinstance(event, str):
            raise LostProcess(event)
        if isinstance(event, Loss):
            if not self.free_running:
                raise LostProcess(event.sentence)
            return
        if isinstance(event, Threaded):
            if event.error is not None:
                raise event.error
            self._scheduler.wake(event)
        elif event is not None:
            self.wiring.arrived(event[0])
            self._deliver(*event)

    def progress(self) -> None:
        """Let exchanges go on that were begun beside a computation; called from inside it."""
        while not self.events.empty():
            self._handle(self.events.get())
        self._scheduler.run_tasks()

    # ---- the verbs, where they are not those of wired.py --------------------------------------------------------------

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """Compute now; a slow stage sleeps before it goes on."""
        result = await super().execute(here, kind, function, arguments)
        if here.stage in self._slow:
            act = self._timeline.acts[-1]
            time.sleep((self._slow[here.stage] - 1.0) * (act.end - act.start))
            self._timeline.acts[-1] = act._replace(end=time.perf_counter())
        return result

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """As in wired.py; to itself: to the thread beside this one."""
        if there == here.place:
            self.wiring.side_events.put(((there, there, self._side.channel(channel)), x))
            return
        await super().send(here, there, channel, x)

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Mean over the replicas, wherever they live."""
        if self._reduction == "backend":
            return await self._backend_mean(here, channel, tensors)
        return await super().mean(here, channel, tensors)

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """The mean, begun now and going on beside the program."""
        if self._reduction == "backend":
            return self._backend_mean(here, channel, tensors)
        return super().begin_mean(here, channel, tensors)

    async def give_way(self, here: Worker, turn: float) -> None:
        """Take in what has happened; then those of this process go on who are at an earlier turn."""
        while not self.events.empty():
            self._handle(self.events.get())
        await Moment(turn)

    def beside(self, here: Worker, words: str, program: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Beside:
        """On the thread beside this one."""
        return self._side.begin(here, words, program, self._timeline)

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

    def close(self) -> None:
        """Leave together with the others; without them, if the run has failed.

        Raises UnlockedError if a message was never taken (on another channel than the `crossing` ones): the method's sends
        and receives do not match.
        """
        well = self.crew.failure is None
        left: list[str] = []
        with contextlib.suppress(LostProcess):
            if well:
                left = self.wiring.missing(self.crossing)  # also a barrier: everything that was to be taken has been
                left += [*self.untaken(), *self._side.untaken()]
        self._side.close()
        self.wiring.closing()
        with contextlib.suppress(LostProcess):
            if well:
                self.crew.barrier()
        self.wiring.close(well)
        if dist.is_initialized() and self._groups and well:
            dist.destroy_process_group()
        self.crew.no_listener(self.events.put, self._abandon)
        if self._own_cluster:
            self.crew.close()
        if left:
            raise UnlockedError(
                f"Messages were never taken: {'; '.join(left)}. The method's sends and receives do not match."
            )
