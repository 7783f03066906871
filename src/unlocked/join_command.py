"""`unlocked join HOST:PORT`: one more replica for a run that goes on."""

from __future__ import annotations

import os
import shlex

from rich.console import Console

from .cluster import Cluster
from .cluster.elastic import Succession
from .cluster.joining import address_of, knock
from .commands import Join, Train
from .saving import receive_hand_over
from .train_command import train


def join(command: Join, console: Console) -> int:
    """Wait to be let in, train with the others to the end; returns the exit code. Raises CannotJoin, InvalidChoice."""
    host, port = address_of(command.address)
    if not command.json:
        console.print(f"Waiting at {host}:{port} to be let in.", highlight=False, soft_wrap=True)
    admission = knock(host, port, command.wait)
    seat, folder = admission.seat, admission.folder.parent
    os.environ["RANK"] = str(seat.rank)  # so that the process ends as one of several does
    alone = Succession(seat, admission.numbers, list(range(len(admission.numbers))), 0, [], [])
    cluster, succession = Cluster.join_generation(alone, command.interface, command.stuck_after)
    seat = succession.seat
    os.environ["RANK"] = str(seat.rank)
    if not command.json:
        console.print(
            f"Joined the run in {folder} as process {seat.rank} of {seat.size}, with the weights of a neighbour.",
            highlight=False,
            soft_wrap=True,
        )
    how = Train(
        resume=folder,
        world="distributed",
        device=command.device,
        json=command.json,
        tensorboard="off",
        interface=command.interface,
        stuck_after=command.stuck_after,
    )
    receive_hand_over(cluster)
    code = train(how, shlex.join(["unlocked", "join", command.address]), console, cluster)
    if not command.json:
        console.print("The run is over.", highlight=False)
    return code
