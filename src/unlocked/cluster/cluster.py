"""This process among the processes of a run."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import CannotJoin, LostProcess, UnlockedError
from ..pool import Pool
from .agreement import Agreement
from .base import Wish
from .clock import clock_offset
from .elastic import Members, Succession
from .heartbeat import Heartbeat, Vitals, name_of, report
from .network import Interface, interface_to
from .pool import SharedPool
from .rendezvous import Seat, describe_self, open_store, read_seat, take_seat

JOIN_WITHIN = 60.0  # seconds
COME_WITHIN = 20.0  # seconds for the members of a new generation to come together
STUCK_AFTER = 30.0  # seconds


class Cluster:
    """All processes of a run, seen from one. Made by `join`; `close` at the end.

    Attributes: `rank`, `size`; `members` (a table of who they are); `hosts` (one key per rank, equal where shared memory
    works); `offsets` (seconds to add to each rank's clock to be on rank 0's); `interface` (of this process); `store`;
    `failure` (the sentence, once something has gone wrong); `vitals` (what the heartbeat says of this process).
    """

    def __init__(self, seat: Seat, store: dist.Store, host: dist.Store | None, interface: Interface) -> None:
        self.seat, self.store, self.interface = seat, store, interface
        self.rank, self.size = seat.rank, seat.size
        self._host = host  # keeps the store alive where this process has to be its host
        self._shares = self._worlds = self._pools = 0
        self.elastic: Members | None = None
        self._numbers: list[int] | None = None
        self.failure: str | None = None
        self.vitals = Vitals()
        self._heartbeat: Heartbeat | None = None
        self._beating = False  # whether it has begun; till then only patience tells that one is lost
        self._listeners: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        self._spare_stores: list[dist.Store] = []
        self._agreement = Agreement()
        self._wished: Wish | None = None
        self.members: list[dict[str, Any]] = self.share(describe_self(interface.address))
        self._check_versions()
        self.hosts = [member["host"] for member in self.members]
        self.offsets: list[float] = self.share(clock_offset(store, self.rank, [m["clock"] for m in self.members]))

    @classmethod
    def join(
        cls,
        interface: str | None = None,
        *,
        seat: Seat | None = None,
        join_within: float = JOIN_WITHIN,
        stuck_after: float = STUCK_AFTER,
        numbers: list[int] | None = None,
    ) -> Cluster:
        """Come together with the other processes of this run, as the starter's environment (or `seat`) says.

        Args:
            interface: name or address of the network interface to use; None: that of the route to the rendezvous host.
            join_within: seconds to wait for the others. stuck_after: seconds of silence after which one counts as stuck.
            numbers: of the members, where these have changed (elastic.py).

        Raises CannotJoin: not started as one of several, no rendezvous, somebody missing, counts or versions that differ.
        """
        seat = seat if seat is not None else read_seat()
        chosen = interface_to(seat.host, interface)
        host_it = not seat.hosted and seat.rank == 0
        host = open_store(seat, join_within, host_it=True) if host_it else None
        store = host if host is not None else open_store(seat, join_within)
        take_seat(store, seat, join_within)
        cluster = cls(seat, store, host, chosen)
        cluster._numbers = numbers
        cluster._start_heartbeat(stuck_after)
        return cluster

    def _start_heartbeat(self, stuck_after: float) -> None:
        store = open_store(self.seat, JOIN_WITHIN)
        self._heartbeat = Heartbeat(
            store, self.rank, self.members, self._agreement, self.vitals, stuck_after, self._failed
        )
        self.barrier()  # everybody has said a first word
        self._heartbeat.start()
        self._beating = True

    def _check_versions(self) -> None:
        for fact in ("unlocked", "torch"):
            for rank, member in enumerate(self.members):
                if member[fact] != self.members[0][fact]:
                    raise CannotJoin(
                        f"Rank {rank} on {member['name']} runs {fact} {member[fact]}, rank 0 on {self.members[0]['name']} "
                        f"{self.members[0][fact]}; install the same version everywhere."
                    )

    @property
    def chief(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """For sentences: `Process 2 (pid 4711 on lab3)`."""
        return name_of(self.members, rank)

    def own_store(self) -> dist.Store:
        """The store by a connection that is the caller's for good."""
        return open_store(self.seat, JOIN_WITHIN)

    @contextlib.contextmanager
    def another_store(self) -> Iterator[dist.Store]:
        """The store by a connection of one's own: one that waits for another process lets nobody else use it.

        Connections are kept for the next who asks, as some systems take seconds to look up a name for each.
        """
        with self._lock:
            store = self._spare_stores.pop() if self._spare_stores else None
        store = store if store is not None else self.own_store()
        yield store
        with self._lock:
            self._spare_stores.append(store)

    def count_worlds(self) -> int:
        """How many worlds were made on this cluster before: alike on all processes, for names that are used once."""
        self._worlds += 1
        return self._worlds - 1

    # ---- members that may be lost, and come ----------------------------------------------------------------------------

    def be_elastic(self, run: dict[str, Any]) -> Members:
        """From now on the loss of another process is no failure: it is told to `Members.on_loss`, and there are roll calls. All
        processes call it. `run`: what one that wants to join is told."""
        if self.elastic is None:
            assert self._heartbeat is not None
            numbers = self._numbers or list(range(self.size))
            store = open_store(self.seat, JOIN_WITHIN, prefix=self.seat.base)
            self.elastic = Members(self.seat, store, numbers)
            if self.chief:
                self.elastic.publish(run)
            self.barrier()
            self._heartbeat.elastic = self.elastic
        return self.elastic

    def roll_call(self, said: Any, left: bool = False) -> Succession:
        """See `Members.roll_call`."""
        assert self.elastic is not None
        return self.elastic.roll_call(said, left=left, failed=lambda: self.failure)

    def next_generation(self, succession: Succession) -> tuple[Cluster, Succession]:
        """The cluster of those who go on, and who they are, should somebody have been lost meanwhile. This one is left behind;
        it is not to be closed."""
        assert self._heartbeat is not None
        self.failure = "The members of this run have changed."
        stuck_after = self._heartbeat.stuck_after
        self._heartbeat.stop()
        self._heartbeat = None
        return Cluster.join_generation(succession, self.interface.name, stuck_after)

    @classmethod
    def join_generation(
        cls, succession: Succession, interface: str | None, stuck_after: float
    ) -> tuple[Cluster, Succession]:
        """Come together with the other members of a new generation, or with those of them that are left."""
        while True:
            seat, numbers = succession.seat, succession.numbers
            try:
                joined = cls.join(
                    interface, seat=seat, join_within=COME_WITHIN, stuck_after=stuck_after, numbers=numbers
                )
                return joined, succession
            except (CannotJoin, LostProcess):
                members = Members(seat, open_store(seat, JOIN_WITHIN, prefix=seat.base), numbers)
                members.bury_missing(open_store(seat, JOIN_WITHIN))
                succession = succession.then(members.roll_call(None, left=True, failed=_burying(members)))

    # ---- agreeing --------------------------------------------------------------------------------------------------

    def share(self, value: Any) -> list[Any]:
        """Everybody's value (JSON), in the order of the ranks; waits for all. Raises LostProcess."""
        self._shares += 1
        turn = self._shares
        self.store.set(f"share/{turn}/{self.rank}", json.dumps(value))
        keys = [f"share/{turn}/{rank}" for rank in range(self.size)]
        self._wait(keys)
        values = [json.loads(text) for text in self.store.multi_get(keys)]
        if turn > 2:  # all have read it: nobody would have come to this turn otherwise
            self.store.delete_key(f"share/{turn - 2}/{self.rank}")
        return values

    def broadcast(self, value: Any = None) -> Any:
        """The value of rank 0 (JSON)."""
        return self.share(value if self.chief else None)[0]

    def barrier(self) -> None:
        """Wait for all. Raises LostProcess."""
        self.share(None)

    def _wait(self, keys: list[str]) -> None:
        """Wait for keys as long as nobody is lost; before there are heartbeats, as long as joining may take."""
        deadline = time.monotonic() + JOIN_WITHIN
        self.vitals.words, self.vitals.waiting = lambda: "all processes to come this far", True
        pause = 1e-4
        while not self.store.check(keys):
            self.check()
            if not self._beating and time.monotonic() > deadline:
                missing = [str(rank) for rank in range(self.size) if not self.store.check([keys[rank]])]
                raise CannotJoin(f"Rank(s) {', '.join(missing)} came to the rendezvous and then fell silent.")
            time.sleep(pause)  # a store's own wait could not be told that somebody was lost
            pause = min(2 * pause, 0.02)
        self.vitals.waiting = False
        self.vitals.activity += 1

    def agree(self, facts: dict[str, Any], where: str) -> None:
        """Check that all processes were told the same. Raises CannotJoin naming the first fact that differs, and on whom."""
        table = self.share(facts)
        for fact, value in table[0].items():
            for rank, row in enumerate(table):
                if row.get(fact) != value:
                    raise CannotJoin(
                        f"The processes were told different things: {fact} of {where} is {row.get(fact)!r} on rank {rank} but "
                        f"{value!r} on rank 0; start all of them with the same options and the same program."
                    )

    # ---- stopping --------------------------------------------------------------------------------------------------

    def wish(self, kind: Wish) -> None:
        """Ask all processes to stop after a whole step. Safe in a signal handler."""
        self._wished = kind
        if self._heartbeat is not None:
            self._heartbeat.wish(kind)

    def pass_wishes_on(self, following: Cluster) -> None:
        """A wish to stop that this generation has not obeyed is one of the next."""
        wish = self._wished or self.stopped_by
        if wish is not None:
            following.wish(wish)

    @property
    def stopped_by(self) -> Wish | None:
        """Why `enter` said stop."""
        return self._agreement.stopped_by

    @property
    def stopping(self) -> bool:
        """Whether somebody has wished to stop, as far as is known here."""
        return self._agreement.stopped_by is not None

    @property
    def changing(self) -> bool:
        """Whether members are lost or want to join, as far as is known here."""
        return self.elastic is not None and (bool(self.elastic.lost) or self.elastic.knocked)

    def pool(self, begin: int, end: int, size: int) -> Pool:
        """The batches `begin` … `end` − 1 for all processes to take from, `size` to a round."""
        self._pools += 1
        return SharedPool(self.store, f"{self._pools}", begin, end, size)

    def enter(self, step: int) -> bool:
        """Called before each step: False to go on, True to stop now, at the same step on every process."""
        return self._agreement.enter(step, self.check)

    # ---- failing ---------------------------------------------------------------------------------------------------

    def on_failure(self, listener: Callable[[str], None]) -> None:
        """`listener(sentence)` is called, on some thread, when a process is lost or reports a failure."""
        with self._lock:
            self._listeners.append(listener)
            failure = self.failure
        if failure is not None:
            listener(failure)

    def no_listener(self, *listeners: Callable[[str], None]) -> None:
        """These are called no more."""
        with self._lock:
            self._listeners = [one for one in self._listeners if one not in listeners]

    def check(self) -> None:
        """Raises LostProcess if something is known to have gone wrong."""
        if self.failure is not None:
            raise LostProcess(self.failure)
        if self.elastic is not None and self.elastic.lost:
            raise LostProcess(next(iter(self.elastic.lost.values())))

    def suspect(self, rank: int, how: str) -> None:
        """For links: the connection to this rank broke."""
        if self._heartbeat is not None:
            self._heartbeat.suspect(rank, f"{self.name(rank)} is gone: {how}.")

    def fail(self, error: BaseException | str) -> None:
        """Tell the others that this process cannot go on, and why; a sentence is told as it is."""
        if self.failure is not None:
            return
        if isinstance(error, str):
            sentence = error
        else:
            reason = str(error) if isinstance(error, UnlockedError) else f"{type(error).__name__}: {error}"
            sentence = f"{self.name(self.rank)} failed: {reason}"
        self.failure = sentence
        with contextlib.suppress(RuntimeError):  # the store is gone, and so are they
            report(self.store, self.rank, sentence)

    def _failed(self, sentence: str) -> None:
        with self._lock:
            self.failure = self.failure or sentence
            listeners = list(self._listeners)
        for listener in listeners:
            listener(sentence)

    def close(self) -> None:
        """Leave: together with the others if all is well, so that nobody takes it for a loss."""
        if self._heartbeat is None:
            return
        with contextlib.suppress(LostProcess, RuntimeError):
            self.barrier()
        self._heartbeat.stop()
        self._heartbeat = None
        with contextlib.suppress(RuntimeError):
            self._leave_store()

    def _leave_store(self) -> None:
        """A store hosted here may go only when the others need it no more."""
        if self.seat.hosted or self.size == 1 or self.failure is not None:
            return
        if self._host is None:
            self.store.set(f"left/{self.rank}", "")
        else:
            self.store.wait([f"left/{rank}" for rank in range(1, self.size)], timedelta(seconds=10))


def _burying(members: Members) -> Callable[[], None]:
    """Called while a roll call without heartbeats waits: who could have come long ago is dead."""
    deadline = time.monotonic() + JOIN_WITHIN + COME_WITHIN

    def wait() -> None:
        if time.monotonic() > deadline:
            members.bury_absent()

    return wait
