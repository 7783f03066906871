"""Across two hosts (two network namespaces joined by a cable): training is the same, and the doctor knows the cable.

This file is also the program that runs inside: `python test_namespaces.py store ADDRESS | train FOLDER | doctor`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unlocked as ul

from methods import assert_same, batch, mlp, momentum, state, trainer
from namespaces import Host, two_hosts, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
STEPS, WITHIN = 8, 180.0  # seconds
MBIT = 50


def dgl(world: ul.worlds.World | None = None) -> ul.Trainer:
    """Two stages of a small MLP after a few updates."""
    made = trainer(
        ul.credit.DGL(head="linear", budget=None),
        stages=2,
        model=mlp(4, norm=True, dropout=0.2, dtype=torch.float32),
        optimizer=momentum,
        seed=5,
        world=world,
    )
    for step in range(STEPS):
        made.step(*batch(12, step, torch.float32))
    return made


# ---- inside ------------------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Be the rendezvous until standard input ends; prints the port."""
    store = torch.distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.read()


def train(folder: str) -> None:
    """Save this rank's tensors."""
    with ul.worlds.Distributed() as world:
        rank = world.crew.rank
        mine = {name: x for name, x in state(dgl(world)).items() if not x.is_meta}
        assert world.crew.interface.name.startswith("ul"), world.crew.interface
        save_file(mine, Path(folder, f"{rank}.safetensors"))


def examine() -> None:
    """The doctor, with its exit code."""
    from unlocked.doctor import doctor

    sys.exit(doctor(json=True))


# ---- outside -----------------------------------------------------------------------------------------------------------


def run_on(hosts: tuple[Host, Host], *command: str, rendezvous_at: str | None = None) -> list[tuple[int, str]]:
    """Exit code and standard output of the command on each host, as ranks 0 and 1; the store is on the first."""
    here = [sys.executable, __file__]
    store = hosts[0].start([*here, "store", hosts[0].address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert store.stdout is not None and store.stdin is not None
    port = store.stdout.readline().strip()
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": port}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    ranks = [
        host.start([*here, *command], env={**os.environ, **job, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank, host in enumerate(hosts)
    ]
    end = time.monotonic() + WITHIN
    said = [process.communicate(timeout=max(0.1, end - time.monotonic()))[0] for process in ranks]
    store.stdin.close()
    assert store.wait(10) == 0
    return [(process.returncode, text) for process, text in zip(ranks, said)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes have: the number of threads decides the order of some sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_trained_across_hosts_is_trained_in_process_bit_for_bit(tmp_path, one_thread):
    with two_hosts() as hosts:
        assert [code for code, _ in run_on(hosts, "train", str(tmp_path))] == [0, 0]
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert all(halves) and not halves[0].keys() & halves[1].keys()
    assert_same(halves[0] | halves[1], state(dgl()))


def examined(hosts: tuple[Host, Host], code: int = 0) -> dict:
    (first, text), (second, nothing) = run_on(hosts, "doctor")
    assert (first, second, nothing) == (code, code, "")
    return json.loads(text)


def test_the_doctor_measures_the_rate_of_the_cable():
    with two_hosts(mbit=MBIT) as hosts:
        report = examined(hosts)
    assert [(link["source"], link["target"], link["kind"]) for link in report["links"]] == [
        (0, 1, "gloo"),
        (1, 0, "gloo"),
    ]
    for link in report["links"]:
        assert 8e-6 * link["rate"] == pytest.approx(MBIT, rel=0.3)
    notes = [finding["sentence"] for finding in report["findings"]]
    assert len([note for note in notes if note.startswith("The link") and "Mbit/s" in note]) == 2
    assert [facts["address"] for facts in report["processes"]] == [host.address for host in hosts]


def test_the_doctor_tells_the_slow_direction():
    with two_hosts() as hosts:
        hosts[0].limit(mbit=MBIT)
        report = examined(hosts, code=1)
    there, back = report["links"]
    assert 8e-6 * there["rate"] == pytest.approx(MBIT, rel=0.3)
    assert back["rate"] > 10 * there["rate"]
    (wrong,) = [finding["sentence"] for finding in report["findings"] if finding["wrong"]]
    assert wrong.startswith("The link 0→1 carries") and "times less than 1→0" in wrong


def namespaces() -> list[str]:
    return sorted(path.name for path in Path("/run/netns").iterdir())


def test_nothing_is_left_behind():
    before = namespaces()
    with pytest.raises(ZeroDivisionError), two_hosts(mbit=MBIT) as (a, b):
        sleepers = [a.start(["sleep", "600"]), b.start(["sh", "-c", "setsid sleep 601 & wait"])]
        assert {a.namespace, b.namespace} <= set(namespaces())
        raise ZeroDivisionError
    assert not {a.namespace, b.namespace} & set(namespaces()) and set(before) <= set(namespaces())
    assert all(process.returncode is not None for process in sleepers)
    found = subprocess.run(["pgrep", "-f", "sleep 601"], capture_output=True, text=True).stdout
    assert found == ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"store": serve, "train": train, "doctor": examine}[sys.argv[1]](*sys.argv[2:])
