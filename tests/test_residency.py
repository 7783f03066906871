"""One stage in memory gives the same numbers as all of them, bit for bit, and is one stage in memory."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unlocked as ul
from unlocked.errors import InvalidChoice
from unlocked.residency import DamagedFile
from unlocked.residency.contents import blank, form, row_of
from unlocked.residency.shelves import Host
from unlocked.worlds import Distributed, InProcess, Simulated

from methods import SMALL, data, mlp
from processes import run_processes

TRAIN, TEST = data(54, dtype=torch.float32), data(30, 1, dtype=torch.float32)
RULES = {
    "dgl": lambda: ul.credit.DGL(head=SMALL, budget=None),
    "predsim": lambda: ul.credit.PredSim(budget=None),
    "greedy": lambda: ul.credit.Greedy(head="linear", budget=None),
}
CHOICES = {"prefetch": ul.OneStage(), "one": ul.OneStage(prefetch=False)}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


def images():
    """A small convolutional network in channels-last order, with BatchNorm."""
    torch.manual_seed(0)
    layers = [
        part for k in range(3) for part in (nn.Conv2d(4 if k else 1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    net = nn.Sequential(nn.Unflatten(1, (1, 1, 5)), *layers, nn.Flatten(), nn.Linear(20, 3))
    return net.to(memory_format=torch.channels_last)


def session(resident=None, rule="dgl", optimizer="momentum", model=None, chain=None, **options):
    """Four stages with everything on: momentum, schedule, clipping, accumulation, dropout, BatchNorm."""
    chain = chain or ul.cut(model or mlp(4, norm=True, dropout=0.2, dtype=torch.float32), 4, like=TRAIN.x[:4])
    options = {
        "clip": 1.0,
        "accumulate": 2,
        "schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    } | options
    credit = options.pop("credit", None) or RULES[rule]()
    return ul.Trainer(chain, credit=credit, optimizer=OPTIMIZERS[optimizer], resident=resident, seed=3, **options)


def fitted(trainer, epochs=3, **more):
    """What a run of some epochs says."""
    records = trainer.fit(TRAIN, epochs, batch_size=12, validate=TEST, **more)
    return [[record[name] for name in ("losses", "validation", "bytes", "learning_rates")] for record in records]


def saved(trainer, folder):
    """All tensors of a checkpoint: weights, BatchNorm's statistics, optimizer state."""
    found = trainer.save(folder)
    return {
        (file.name, name): x
        for file in sorted(found.glob("replica*.safetensors"))
        for name, x in load_file(file).items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    odd = [name for name in one if not torch.equal(one[name], other[name])]
    assert not odd, f"these differ: {odd}"


def in_memory(trainer):
    """The stages of which anything is in memory, by the storages of their tensors."""
    found = set()
    for weights in trainer.weights:
        tensors = [*weights.stage.parameters(), *weights.stage.buffers(), *weights.optimizer_state()]
        if any(x.numel() > 1 and x.untyped_storage().nbytes() > x.element_size() for x in tensors):
            found.add(weights.worker.stage)
    return found


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "case",
    [
        {"rule": "dgl", "optimizer": "adamw"},
        {"rule": "predsim"},
        {"rule": "greedy", "optimizer": "adamw"},
        {"rule": "dgl", "model": images, "optimizer": "adamw"},
        {"rule": "dgl", "precision": "bf16", "accumulate": 1, "clip": None},
    ],
    ids=["dgl", "predsim", "greedy", "images", "bf16"],
)
def test_one_stage_in_memory_equals_all_of_them(case, choice, tmp_path):
    made = {"model": case["model"]() if "model" in case else None}
    whole, one = session(**case | made), session(CHOICES[choice], **case | copy.deepcopy(made))
    assert fitted(whole) == fitted(one)
    assert len(in_memory(whole)) == 4 and len(in_memory(one)) == 1
    assert_equal(saved(whole, tmp_path / "whole"), saved(one, tmp_path / "one"))
    assert_equal(dict(whole.averaged().state_dict()), dict(one.averaged().state_dict()))
    assert_equal(dict(whole.members()[0].state_dict()), dict(one.members()[0].state_dict()))
    assert torch.equal(whole.ensemble(TEST.x), one.ensemble(TEST.x))
    assert len(in_memory(one)) == 1


def test_never_more_than_one_stage_is_filled_also_while_it_computes():
    trainer, seen = session(ul.OneStage()), []
    for weights in trainer.weights:
        j, update = weights.worker.stage, weights.update
        weights.stage.body.register_forward_hook(lambda *_, j=j: seen.append((j, in_memory(trainer))))
        weights.update = lambda j=j, update=update: (update(), seen.append((j, in_memory(trainer))))
    fitted(trainer, 2)
    trainer.evaluate(TEST)
    assert seen and all(there == {j} for j, there in seen)


def test_who_looks_at_a_stage_that_is_away_sees_nan_of_its_shape():
    trainer = session(ul.OneStage())
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    away = trainer.chains[0][0].body[0].weight
    assert away.shape == (7, 5) and away.isnan().all() and not trainer.chains[0][3].body[0].weight.isnan().any()
    before = trainer.averaged().stages[0].body[0].weight
    assert not before.isnan().any()
    copied = copy.deepcopy(trainer.chains[0][3])  # an ordinary stage, that asks for nothing
    trainer.evaluate(TEST)
    trainer.chains[0](TEST.x)  # each stage is brought by running it
    here = trainer.residence.here
    copied(torch.randn(4, 7))
    assert trainer.residence.here == here == 3 and torch.equal(trainer.averaged().stages[0].body[0].weight, before)


def test_reading_and_judging_writes_nothing():
    trainer = session(ul.OneStage(prefetch=False))
    fitted(trainer, 1)
    trainer.evaluate(TEST)
    stored, store = [], trainer.residence._shelf.store
    trainer.residence._shelf.store = lambda stage, rows: (stored.append(stage), store(stage, rows))
    trainer.evaluate(TEST)
    trainer.averaged()
    assert stored == []
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    assert stored == [0, 1, 2, 3, 0, 1, 2]


# ---- keeping and going on ----------------------------------------------------------------------------------------------


class StopAt(ul.callbacks.Callback):
    """Ctrl-C in the middle of an epoch."""

    def on_step(self, trainer, record):
        if trainer.steps == 6:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.covering
@pytest.mark.parametrize("after", [None, ul.OneStage()], ids=["all", "one"])
def test_stopped_and_resumed_equals_never_stopped(after, tmp_path):
    whole, one = session(optimizer="adamw"), session(ul.OneStage(), optimizer="adamw")
    fitted(whole)
    with pytest.raises(ul.Interrupted):
        fitted(one, checkpoint=tmp_path / "run", callbacks=[StopAt()])
    again = ul.Trainer.resume(
        tmp_path / "run",
        ul.cut(mlp(4, norm=True, dropout=0.2, dtype=torch.float32), 4, like=TRAIN.x[:4]),
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
        resident=after,
    )
    fitted(again)
    assert_equal(saved(whole, tmp_path / "whole"), saved(again, tmp_path / "again"))


def test_a_step_that_fails_leaves_the_last_checkpoint_and_no_file(tmp_path):
    kept = tmp_path / "stages"
    trainer = session(ul.OneStage("disk", kept))
    fitted(trainer, 1, checkpoint=tmp_path / "run")
    assert kept.is_dir() and not any(kept.iterdir())  # the files have no names, so nothing is ever left of them
    with pytest.raises(ul.UnlockedError, match="is nan"):
        trainer.step(torch.full((12, 5), float("nan")), TRAIN.y[:12])
    chain = ul.cut(mlp(4, norm=True, dropout=0.2, dtype=torch.float32), 4, like=TRAIN.x[:4])
    schedule = trainer.weights[0].store.scheduler
    again = ul.Trainer.resume(
        tmp_path / "run", chain, schedule=lambda o: type(schedule)(o, 40), resident=ul.OneStage("disk", kept)
    )
    reference = session()
    fitted(reference), fitted(again)
    assert_equal(saved(reference, tmp_path / "a"), saved(again, tmp_path / "b"))


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: os.ftruncate(d, os.fstat(d).st_size - 1), "bytes, but"),
        (lambda d: os.pwrite(d, b"\x55", 40), "is damaged"),
        (lambda d: (b := os.pread(d, 16, 0), os.pwrite(d, b[8:] + b[:8], 0)), None),
    ],
    ids=["truncated", "damaged", "order of words"],
)
def test_a_file_that_was_changed_is_a_sentence(harm, words):
    trainer = session(ul.OneStage(prefetch=False))
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    harm(trainer.residence._shelf.descriptor(1))
    if words is None:
        trainer.evaluate(TEST)  # stated: the checksum of a tensor does not see an exchange of its words
        return
    with pytest.raises(DamagedFile, match=f"stage 1 .*{words}.*last checkpoint"):
        trainer.evaluate(TEST)


class Counting(nn.Module):
    """Counts what it has seen, also when it is judged; some keep a table that grows with what they are given."""

    def __init__(self, grows):
        super().__init__()
        self.grows = grows
        self.register_buffer("seen", torch.zeros(12))

    def forward(self, x):
        self.seen += 1
        if self.grows and len(x) > len(self.seen):
            self.seen = torch.ones(len(x))
        return x + self.seen[: len(x), None]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("grows", [False, True])
def test_what_a_module_changes_when_it_is_judged_is_kept(grows, choice):
    def model():
        return nn.Sequential(*[part for one in mlp(4, dtype=torch.float32) for part in (one, Counting(grows))])

    whole, one = session(model=model()), session(CHOICES[choice], model=model())
    for trainer in (whole, one):
        trainer.evaluate(data(12, 1, dtype=torch.float32), batch_size=12)
        trainer.step(TRAIN.x[:12], TRAIN.y[:12])
        if grows:
            trainer.evaluate(TEST)
    assert whole.step(TRAIN.x[:12], TRAIN.y[:12]) == one.step(TRAIN.x[:12], TRAIN.y[:12])


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_a_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DamagedFile, match=r"Stages cannot be kept in .*another folder"):
        session(ul.OneStage("disk", tmp_path / folder))


def test_a_disk_that_is_full_after_the_last_step_is_a_sentence_when_it_is_judged(monkeypatch):
    trainer = session(ul.OneStage())
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    trainer.residence._wait_for_writing()  # of the stage before the last

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        with pytest.raises(DamagedFile, match=r"Stage 3 could not be written.*last checkpoint"):
            trainer.evaluate(TEST)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_full_disk_is_a_sentence_and_stays_one(prefetch, monkeypatch):
    trainer = session(ul.OneStage(prefetch=prefetch))
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        with pytest.raises(DamagedFile, match=r"Stage \d could not be written.*No space left.*last checkpoint"):
            trainer.step(TRAIN.x[:12], TRAIN.y[:12])


# ---- memory --------------------------------------------------------------------------------------------------------------


def test_a_chain_can_be_built_stage_by_stage(tmp_path):
    def parts():
        return list(mlp(3, norm=True, dtype=torch.float32))

    def makers():
        return [lambda k=k: nn.Sequential(*parts()[3 * k : 3 * k + 3]) for k in range(4)]

    choice = ul.OneStage()
    built = choice.chain(makers(), like=TRAIN.x[:4])
    assert sum(not x.isnan().all() for x in built.parameters()) == 2  # the last one's weight and bias
    one = session(choice, chain=built)
    whole = session(chain=ul.Chain([ul.Stage(make()) for make in makers()], like=TRAIN.x[:4]))
    assert fitted(whole) == fitted(one)
    assert_equal(saved(whole, tmp_path / "whole"), saved(one, tmp_path / "one"))
    with pytest.raises(InvalidChoice, match="built by OneStage"):
        session(chain=choice.chain(makers(), like=TRAIN.x[:4]))


PROGRAM = """
import sys, torch, unlocked as ul
from pathlib import Path
from torch import nn
torch.set_num_threads(1)
def memory(line):
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(line + ":"))
width, depth, choice = 1024, 13, {"all": None, "one": ul.OneStage(prefetch=False), "two": ul.OneStage()}[sys.argv[1]]
def make(width=width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())
def trained(width, depth, choice):
    x, y = torch.randn(32, width), torch.randint(8, (32,))
    makers = [lambda: make(width)] * (depth - 1) + [lambda: nn.Linear(width, 8)]
    chain = choice.chain(makers, like=x) if choice else ul.Chain([ul.Stage(make()) for make in makers], like=x)
    trainer = ul.Trainer(chain, credit=ul.credit.DGL(head="linear", budget=None), resident=choice,
                         optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    for _ in range(3):
        trainer.step(x, y)
    return trainer
trained(16, 3, ul.OneStage())  # what is loaded at first use
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
kept = trained(width, depth, choice)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is Linux's to tell")
def test_the_peak_of_a_process_is_under_the_stated_bound():
    def peak(which):
        run = [sys.executable, "-c", PROGRAM, which]
        return int(subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout)

    weights = 4 * 1024 * 1024  # of a stage; its AdamW has twice as much
    state = 3 * weights
    first_use = 16 * 1024 * 1024  # what PyTorch makes when it is first asked for something; varies from run to run
    more = 3 * state + 6 * weights + first_use  # held back by the C library; gradient, temporaries
    assert peak("all") > 11 * state
    assert peak("one") < state + more
    assert peak("two") < 3 * state + more


def test_stages_in_host_memory_come_back_as_they_were():
    torch.manual_seed(0)
    xs = [torch.randn(3, 4, 5).to(torch.bfloat16), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    shelf, rows = Host(), blank([form(x) for x in xs], torch.device("cpu"))
    shelf.store(1, [row_of(x) for x in xs])
    shelf.fetch(1, rows)
    for x, row in zip(xs, rows):
        assert torch.equal(row.as_strided(x.shape, x.stride()), x)
    with pytest.raises(InvalidChoice, match="host's memory already"):
        session(ul.OneStage("host"))


def test_memory_of_an_accelerator_is_kept_until_its_copies_are_done():
    residence, rows, there = ul.OneStage().residence(torch.device("cpu"), Host()), [torch.randn(4)], []

    class Stream:
        def synchronize(self):
            there.append(len(rows))

    residence._stream = Stream()
    residence._store(0, rows)
    assert there == [1] and rows == []


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"credit": ul.credit.Backprop()}, "under backprop a stage waits for gradients"),
        ({"credit": ul.credit.MeZO()}, "under mezo a stage waits for scalars of other stages"),
        ({"credit": ul.credit.NodePerturbation()}, "under node-perturbation a stage waits for scalars"),
        ({"credit": ul.credit.ForwardGradient("gaussian")}, "under forward-gradient a stage waits for scalars"),
        (
            {"credit": ul.credit.ForwardGradient("gaussian", mode="two-backward")},
            "under forward-gradient a stage waits for gradients",
        ),
        ({"credit": ul.credit.Interlocking(1, head=SMALL, budget=None)}, "under interlocking"),
        ({"credit": ul.credit.PipeDream(), "accumulate": 1}, "under pipedream"),
        ({"consensus": ul.consensus.WASH(p=0.1), "replicas": 2}, "wash looks at the weights of all stages"),
        ({"replicas": 2}, "2 replicas are averaged"),
        ({"world": Simulated()}, "simulated clock"),
        ({"world": InProcess(streams=True)}, "side by side"),
    ],
)
def test_what_needs_several_stages_at_once_is_refused(options, words):
    with pytest.raises(InvalidChoice, match=f"One stage in memory is not possible here: .*{words}"):
        session(ul.OneStage(), **options)


@pytest.mark.parametrize("again", [None, ul.OneStage()])
def test_a_chain_whose_stages_are_away_is_refused_and_the_whole_one_is_not(again):
    trainer = session(ul.OneStage())
    trainer.step(TRAIN.x[:12], TRAIN.y[:12])
    with pytest.raises(InvalidChoice, match="Another trainer keeps one stage"):
        session(again, chain=trainer.chains[0])
    session(again, chain=trainer.averaged()).step(TRAIN.x[:12], TRAIN.y[:12])
    with pytest.raises(InvalidChoice, match="resident='disk' is not possible"):
        session("disk")


def test_backpropagation_is_not_compared_with_stages_that_are_away():
    with pytest.raises(InvalidChoice, match="needs all of them in memory"):
        fitted(session(ul.OneStage()), 1, callbacks=[ul.callbacks.GradientCosine(every=2)])


def test_tensors_that_share_memory_are_refused():
    model = mlp(2, dtype=torch.float32)
    model[0].register_buffer("first", model[0].weight.detach()[0])
    with pytest.raises(InvalidChoice, match=r"body\.0.*weight and body.*first of stage 0 are views"):
        session(ul.OneStage(), chain=ul.cut(model, 2, like=TRAIN.x[:4]))
    with pytest.raises(InvalidChoice, match="did you mean 'disk'"):
        ul.OneStage("disc")


# ---- several processes --------------------------------------------------------------------------------------------------


def two_stages_each(cluster, resident):
    trainer = session(resident, world=Distributed(cluster))
    records = fitted(trainer, 2)
    stages = in_memory(trainer)
    average = trainer.averaged()
    return records, stages, None if average is None else dict(average.state_dict())


def test_every_process_keeps_one_of_its_stages_in_memory():
    reference = session()
    records = fitted(reference, 2)
    (first, here, average), (second, there, _) = run_processes(two_stages_each, 2, ul.OneStage())
    assert first == second == records
    assert len(here) == len(there) == 1 and not here & there
    assert_equal(average, dict(reference.averaged().state_dict()))
