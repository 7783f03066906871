"""`unlocked join HOST:PORT`: one more replica for a run that goes on."""

from __future__ import annotations

import os
import shlex

from rich.console import Console

from .cluster import Cluster
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
    cluster = Cluster.join(command.interface, seat=seat, stuck_after=command.stuck_after, numbers=admission.numbers)
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
