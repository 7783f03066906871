"""Runs whose processes are killed, stopped and joined, and what each of them writes down meanwhile.

Every process keeps a ledger of x + x̃ of its weights (x alone without momentum), which mixing leaves alone: what its gradients
did to them, and what its exchanges did, by the neighbour. So nothing is lost if and only if

    end − start = gradients + Σ over neighbours of exchanges         for each process
    exchanges of i with j  +  exchanges of j with i = 0              for each two that were there to the end

A process's batches are written to a file at once, so that those of one that is killed are known as well.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import unlocked as ul
from unlocked import freely, handing_over
from unlocked.callbacks import Callback
from unlocked.cluster import Cluster, joining
from unlocked.cluster import cluster as cluster_module
from unlocked.cluster.elastic import bury
from unlocked.cluster.pool import SharedPool
from unlocked.cluster.rendezvous import Seat
from unlocked.consensus.gossip import Gossip
from unlocked.consensus.gossiping.available import Available
from unlocked.consensus.gossiping.copies import Copies
from unlocked.errors import MembersChanged
from unlocked.rng import generator
from unlocked.saving import receive_hand_over
from unlocked.worlds import Distributed

from methods import data, mlp, trainer
from processes import Processes, kill_me

BATCH = 2


class Plan(NamedTuple):
    """What all processes of a run do. rounds: of an epoch, a batch for each of the first `workers`. pause: seconds a gradient
    takes at least."""

    rule: Gossip
    workers: int
    folder: Path
    epochs: int = 12
    rounds: int = 12
    pause: float = 0.01
    come_within: float | None = (
        None  # seconds that the members of a new generation have to come together; None: as usual
    )

    def train(self) -> Any:
        return data(self.rounds * self.workers * BATCH)

    @property
    def batches(self) -> set[tuple[int, int]]:
        """(epoch, number) of all of them."""
        return {(epoch, k) for epoch in range(self.epochs) for k in range(self.rounds * self.workers)}


class Ledger:
    """What happens to the weights of this process; instruments for one process with one worker."""

    def __init__(self, folder: Path, number: int, numbers: list[int]) -> None:
        self.number, self.numbers = number, numbers
        self.gradients: Tensor | float = 0.0
        self.exchanges: dict[int, Tensor | float] = defaultdict(float)
        self.trainer: ul.Trainer | None = None
        self.left: list[bool] = []  # of each roll call that found a change, whether it was outside a window
        self._partner: int | None = None
        self._taken = (folder.parent / f"taken-{number}").open("a", buffering=1)

    def install(self) -> Ledger:
        """From now on everything is noted."""
        meet, displace, exchange, take = Copies.meet, Copies.displace, Available._exchange_with, SharedPool.take

        def noted_meet(copies: Copies, mine: Any, theirs: Any, time: float) -> None:
            before = total(copies)
            meet(copies, mine, theirs, time)
            assert self._partner is not None
            self.exchanges[self._partner] += total(copies) - before

        def noted_displace(copies: Copies, before: Any, after: Any, time: float) -> None:
            start = total(copies)
            displace(copies, before, after, time)
            self.gradients += total(copies) - start

        async def noted_exchange(weights: Available, here: Any, neighbour: int, time: float, mine: bool) -> None:
            assert self._partner is None, "two exchanges at once"
            self._partner = self.numbers[neighbour]
            try:
                await exchange(weights, here, neighbour, time, mine)
            finally:
                self._partner = None

        def noted_take(pool: SharedPool) -> int | None:
            number = take(pool)
            if number is not None and self.trainer is not None:
                members = ",".join(map(str, self.numbers))
                self._taken.write(f"{self.trainer.epoch} {number} {time.time()} {members}\n")
            return number

        Copies.meet, Copies.displace = noted_meet, noted_displace  # type: ignore[method-assign]
        Available._exchange_with, SharedPool.take = noted_exchange, noted_take  # type: ignore[method-assign]
        roll_call = handing_over.roll_call

        def noted_roll_call(made: ul.Trainer, folder: Path, left: bool = False) -> None:
            try:
                roll_call(made, folder, left)
            except MembersChanged:
                self.left.append(left)
                raise

        for module in (handing_over, freely):
            module.roll_call = noted_roll_call  # type: ignore[attr-defined]
        return self


def total(copies: Copies) -> Tensor:
    """x + x̃, or x where there is no momentum."""
    (x,) = copies.x
    return x.clone() if copies.tilde is None else x + copies.tilde[0]


def weights_of(made: ul.Trainer) -> Available:
    (weights,) = made.weights
    assert isinstance(weights, Available)
    return weights


def state_of(made: ul.Trainer, momentum: bool) -> Tensor:
    """As `total`, between two windows."""
    weights = weights_of(made)
    x = torch.cat([p.detach().reshape(-1) for p in weights.averaged])
    if not momentum:
        return x
    return x + (x if weights.copies.tilde is None else weights.copies.tilde[0])


class Slow(Callback):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_step(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        time.sleep(self._seconds)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def first_trainer(world: Distributed, plan: Plan) -> ul.Trainer:
    """Every replica begins with weights of its own."""
    made = trainer(
        ul.credit.Backprop(), plan.rule, 1, model=mlp(2), replicas=plan.workers, world=world, optimizer=sgd, seed=1
    )
    with torch.no_grad():
        for k, x in enumerate(weights_of(made).parameters):
            source = generator(7, "first weights", world.crew.rank, k)
            x.add_(torch.randn(x.shape, generator=source, dtype=x.dtype))
    return made


def resumed(world: Distributed, plan: Plan) -> ul.Trainer:
    return ul.Trainer.resume(plan.folder, ul.cut(mlp(2), 1, like=plan.train().x[:4]), world=world)


def train(cluster: Cluster, plan: Plan, ledger: Ledger, made: ul.Trainer | None = None) -> dict[str, Any]:
    """To the end, whoever is lost or comes; as train_command.py does."""
    if plan.come_within is not None:
        cluster_module.COME_WITHIN = plan.come_within
    momentum = plan.rule.name == "acid"
    world = Distributed(cluster)
    made = (
        first_trainer(world, plan) if made is None and not (plan.folder / "LATEST").exists() else resumed(world, plan)
    )
    start, changes, resumptions = state_of(made, momentum).clone(), [], []
    while True:
        ledger.trainer = made
        try:
            made.fit(
                plan.train(),
                plan.epochs,
                batch_size=BATCH,
                validate=data(20, 1),
                checkpoint=plan.folder,
                callbacks=[Slow(plan.pause)],
            )
            break
        except MembersChanged as change:
            world.close()
            changes.append(change.record)
            cluster = change.cluster
            ledger.numbers = list(cluster._numbers or [])
            world = Distributed(cluster)
            made = resumed(world, plan)
            resumptions.append(state_of(made, momentum).clone())
    end = state_of(made, momentum)
    outcome = {
        "number": ledger.number,
        "numbers": ledger.numbers,
        "start": start,
        "end": end.clone(),
        "gradients": ledger.gradients,
        "exchanges": dict(ledger.exchanges),
        "changes": changes,
        "resumed": resumptions,
        "left": ledger.left,
        "steps": made.steps,
        "epoch": made.epoch,
        "batch_in_epoch": made.batch_in_epoch,
        "edges": len(weights_of(made).graph),
    }
    world.close()
    cluster.close()
    return outcome


def live(cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """One of the first members, to the end."""
    ledger = Ledger(plan.folder, cluster.rank, list(range(cluster.size))).install()
    return train(cluster, plan, ledger)


def come(plan: Plan, port: int) -> dict[str, Any]:
    """One that joins, as join_command.py does."""
    admission = joining.knock("127.0.0.1", port, 120.0)
    cluster = Cluster.join(seat=admission.seat, numbers=admission.numbers)
    ledger = Ledger(plan.folder, admission.numbers[admission.seat.rank], admission.numbers).install()
    receive_hand_over(cluster)
    return train(cluster, plan, ledger)


def knock_and_die(plan: Plan, port: int) -> None:
    """One that wants to join, and is killed before anybody has let it in."""
    joining._await_admission = lambda *arguments: kill_me()  # type: ignore[assignment]
    joining.knock("127.0.0.1", port, 120.0)


class Comer:
    """A process that runs `function(plan, port)`; a context manager that leaves none behind."""

    def __init__(self, function: Callable[[Plan, int], Any], plan: Plan, port: int) -> None:
        self._answer = plan.folder.parent / "comer.pt"
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_come, args=(function, plan, port, self._answer), daemon=True)

    def __enter__(self) -> Comer:
        self.process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()

    def result(self, deadline: float) -> Any:
        """What the function returned."""
        self.process.join(deadline)
        assert self.process.exitcode == 0, f"exit code {self.process.exitcode}"
        return torch.load(self._answer, weights_only=False)


def _come(function: Callable[[Plan, int], Any], plan: Plan, port: int, answer: Path) -> None:
    torch.set_num_threads(1)
    torch.save(function(plan, port), answer)


# ---- what was taken ----------------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """A batch that a process took, when, and who the members were."""

    epoch: int
    number: int
    when: float
    members: tuple[int, ...]


def taken(plan: Plan, number: int) -> list[Taken]:
    """By one process, in its order."""
    path = plan.folder.parent / f"taken-{number}"
    rows = [line.split() for line in path.read_text().splitlines() if line.count(" ") == 3] if path.exists() else []
    return [Taken(int(a), int(b), float(c), tuple(map(int, d.split(",")))) for a, b, c, d in rows]


def progress(plan: Plan) -> int:
    """How many batches were taken by all of them."""
    return sum(len(taken(plan, number)) for number in range(plan.workers))


# ---- killing -----------------------------------------------------------------------------------------------------------


class Killed(NamedTuple):
    """What became of a run whose processes were killed. rows: of the survivors. victims: their numbers, in order. seconds:
    from each kill until a batch is taken by members that do without it."""

    rows: list[dict[str, Any]]
    victims: list[int]
    seconds: list[float]


def killing(plan: Plan, kills: int, seed: int, buried: bool, deadline: float = 180.0) -> Killed:
    """Kill so many, one after the other, anywhere in the run. buried: by the test at once, as the launcher does; else those
    who are left find out by themselves."""
    source, alive, victims, seconds = random.Random(seed), list(range(plan.workers)), [], []
    end = time.monotonic() + deadline
    with Processes(live, plan.workers, plan) as running:
        registry = dist.PrefixStore(Seat(0, 1, "", 0, True, 0).base, running.store)
        for kill in range(kills):
            share = (kill + source.uniform(0.2, 0.6)) / (kills + 1)  # so that enough is left to do after the last
            wait(lambda share=share: progress(plan) >= share * len(plan.batches), running, alive, end)
            time.sleep(source.uniform(0.0, 0.3))
            victim = source.choice(alive)
            alive.remove(victim)
            running.processes[victim].kill()
            running.processes[victim].join()
            moment = time.time()
            victims.append(victim)
            if buried:
                bury(registry, victim, f"Process {victim} was killed.")
            wait(lambda victim=victim: first_without(plan, alive, victim) is not None, running, alive, end)
            seconds.append((first_without(plan, alive, victim) or 0.0) - moment)
        rows = [running.result(number, max(1.0, end - time.monotonic())) for number in alive]
        for number in alive:
            running.processes[number].join(30.0)
            assert running.processes[number].exitcode == 0
    return Killed(rows, victims, seconds)


def first_without(plan: Plan, alive: list[int], victim: int) -> float | None:
    """When a batch was first taken by members that do without it, if any was."""
    return min((row.when for number in alive for row in taken(plan, number) if victim not in row.members), default=None)


def wait(what: Callable[[], bool], running: Processes, alive: list[int], end: float) -> None:
    """Until it is so; raises as soon as a process fails, or the deadline has come."""
    while not what():
        for number in alive:
            if running.processes[number].exitcode not in (None, 0):
                running.result(number, 1.0)
        assert any(running.processes[number].is_alive() for number in alive), "they ended before it was so"
        assert time.monotonic() < end, "they hang"
        time.sleep(0.01)
