"""The links of one process of a distributed world: opened when first used, between workers here and workers elsewhere."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from ..cluster import Cluster
from ..errors import InvalidChoice, choose
from ..links import Door, GroupReceiver, GroupSender, RingSender
from ..links.process_group import pair_group
from ..worker import DRAINED, Place
from .local import Key

Links = Literal["auto", "shared-memory", "gloo"]
SIDE = "/beside"  # ends the names of channels whose messages go to the thread beside the main one
Event = (
    Any  # a message (Key, Tensor), a process is lost (the sentence), something has been sent (None), or beside.py's own
)
_ROOM = 2  # messages of a channel that may lie here untaken
_ROOM_DRAINED = 1000  # of one whose receiver takes all of them at once: a new message is not to wait behind old ones


def described(key: Key) -> str:
    """A channel, in words."""
    return f"channel {key[2]!r} from {key[0]} to {key[1]}"


def _room(channel: str) -> int:
    return _ROOM_DRAINED if channel.endswith(DRAINED) else _ROOM


class Wiring:
    """All links of this process. What arrives is put into `events` or `side_events`, by threads; `put` never waits."""

    def __init__(self, crew: Cluster, name: str, links: Links) -> None:
        choose("kind of links", links, ("auto", "shared-memory", "gloo"))
        if links == "shared-memory" and len(set(crew.hosts)) > 1:
            raise InvalidChoice(
                "links='shared-memory' joins processes of one host, but these are on several; give 'auto'."
            )
        self._crew, self._name, self._links = crew, name, links
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.side_events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._room: dict[Key, threading.Semaphore] = {}
        self._senders: dict[Key, RingSender | GroupSender] = {}
        self._receivers: dict[Key, GroupReceiver] = {}
        self._door = Door(self._open_channel)
        self._doors: list[str] = crew.share(self._door.address)

    def put(self, key: Key, rank: int, x: Tensor, window: int) -> int:
        """Send to a worker on that rank; returns the bytes on the wire."""
        if key not in self._senders:
            self._senders[key] = self._open_sender(key, rank)
        self._count(self._crew.vitals.sent, key)
        return self._senders[key].put(x, window)

    def listen(self, key: Key, rank: int) -> None:
        """A worker here is about to take from this channel. Through memory the sender opens it, over gloo both sides do."""
        if not self._shared(rank) and key not in self._receivers:
            self._room[key] = threading.Semaphore(_room(key[2]))
            self._receivers[key] = GroupReceiver(
                lambda: self._pair(key, 1), lambda x: self._arrived(key, x), self._loss_of(rank)
            )

    def say_first(self, name: str, text: str) -> str:
        """What was said first under this name, by whichever process."""
        with self._crew.another_store() as store:
            return store.compare_set(f"{self._name}/first/{name}", "", text).decode()

    def taken(self, key: Key) -> None:
        """A message of the channel has been taken: there is room for another."""
        if key in self._room:
            self._room[key].release()

    def arrived(self, key: Key) -> None:
        """A message of the channel has come to the main thread."""
        self._count(self._crew.vitals.got, key)

    def missing(self, crossing: Collection[str] = ()) -> list[str]:
        """Channels to this process, but the `crossing` ones, on which more was sent than came to the main thread; all
        processes call it."""
        sent: dict[str, int] = {}
        for row in self._crew.share(
            {name: n for name, n in self._crew.vitals.sent.items() if name.startswith(f"{self._name} ")}
        ):
            sent |= row
        got = self._crew.vitals.got
        lacking = {key: sent.get(self._called(key), 0) - got.get(self._called(key), 0) for key in self._room}
        lacking = {key: number for key, number in lacking.items() if key[2] not in crossing}
        return [f"{number} on {described(key)}" for key, number in lacking.items() if number > 0]

    def _called(self, key: Key) -> str:
        """The channel's name in the vitals, which all worlds of a cluster share."""
        return f"{self._name} {described(key)}"

    def _count(self, counts: dict[str, int], key: Key) -> None:
        counts[self._called(key)] = counts.get(self._called(key), 0) + 1

    def oldest(self) -> Iterator[Callable[[], int | None]]:
        """For every link out of here: what tells the window of the oldest message that has not left."""
        for sender in list(self._senders.values()):
            yield lambda sender=sender: sender.oldest  # type: ignore[misc]

    def closing(self) -> None:
        """From now on the other side's end is no loss."""
        for link in (*self._senders.values(), *self._receivers.values(), self._door):
            link.closing()

    def close(self, well: bool) -> None:
        """End all links; after a failure not gloo's, whose threads may sit where nothing wakes them."""
        gloo = [sender for sender in self._senders.values() if isinstance(sender, GroupSender)]
        rings = [sender for sender in self._senders.values() if isinstance(sender, RingSender)]
        for link in (*(gloo if well else ()), *(self._receivers.values() if well else ()), *rings, self._door):
            link.close()

    def _shared(self, rank: int) -> bool:
        """Whether messages from and to this rank go through memory."""
        if self._links == "shared-memory":
            return True
        return self._links == "auto" and self._crew.hosts[rank] == self._crew.hosts[self._crew.rank]

    def _open_sender(self, key: Key, rank: int) -> RingSender | GroupSender:
        lost = self._loss_of(rank)
        if self._shared(rank):
            return RingSender(self._doors[rank], [self._crew.rank, *key], lost, self._sent)
        return GroupSender(lambda: self._pair(key, 0), lost, self._sent)

    def _open_channel(self, told: Any) -> tuple[Callable[[Tensor], None], Callable[[str], None]]:
        """A process of this host opens a channel; called on a thread."""
        rank, source, target, channel = told
        key = (Place(*source), Place(*target), str(channel))
        self._room[key] = threading.Semaphore(_room(key[2]))
        return lambda x: self._arrived(key, x), self._loss_of(rank)

    def _arrived(self, key: Key, x: Tensor) -> None:
        """On a receiving thread: hand over, unless too many lie there already."""
        if not self._room[key].acquire(blocking=False):
            full = self._crew.vitals.full
            full[self._called(key)] = True
            self._room[key].acquire()
            full[self._called(key)] = False
        (self.side_events if key[2].endswith(SIDE) else self.events).put((key, x))

    def _sent(self) -> None:
        self.events.put(None)

    def _loss_of(self, rank: int) -> Callable[[str], None]:
        return lambda how: self._crew.suspect(rank, how)

    def _pair(self, key: Key, side: int) -> dist.ProcessGroup:
        (a, b), (c, d), channel = key
        name = f"{self._name}/{a}.{b}/{c}.{d}/{channel}"
        with self._crew.another_store() as store:
            return pair_group(store, name, side, self._crew.interface.address)
