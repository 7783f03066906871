"""Greedy learning with cached features equals greedy learning; the stages below have nothing to do; damage is noticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.errors import InvalidChoice
from unlocked.feature_cache import FeatureFile, numbered
from unlocked.method_names import make_credit, parse_call
from unlocked.residency import DamagedFile
from unlocked.simulation.costs import unit
from unlocked.worlds import Distributed, Simulated

from methods import data, mlp, state, trainer
from processes import run_processes

TRAIN, TEST = data(50), data(30, 1)  # batches of 12: another two samples are left out of every epoch


def session(cache=None, consensus=None, **options):
    options = {"model": mlp(3, norm=True, dropout=0.2), "accumulate": 2, "seed": 3} | options
    credit = ul.credit.Greedy(head="linear", budget=None, cache=None if cache is None else str(cache))
    return trainer(credit, consensus, **options)


def fitted(session, train=TRAIN, **more):
    """The records of a run of three epochs for each of three stages."""
    return session.fit(train, 3, batch_size=12, validate=TEST, **more)


def told(records):
    return [[record[name] for name in ("losses", "validation", "learning_rates", "samples")] for record in records]


class Watch(ul.callbacks.Callback):
    """How often each stage ran forward, in every epoch."""

    def __init__(self):
        self.epochs, self._now = [], {}

    def on_step(self, trainer, record):
        for act in trainer.timeline:
            if act.kind == "F":
                self._now[act.stage] = self._now.get(act.stage, 0) + 1

    def on_epoch(self, trainer, record):
        self.epochs.append(self._now)
        self._now = {}


@pytest.mark.parametrize("replicas", [1, 2])
def test_cached_equals_computed_anew_in_float64(replicas, tmp_path):
    consensus = ul.consensus.AllReduce() if replicas == 2 else None
    plain, cached = session(None, consensus, replicas=replicas), session(tmp_path, consensus, replicas=replicas)
    one, other = fitted(plain), fitted(cached)
    for name, x in state(plain).items():
        torch.testing.assert_close(state(cached)[name], x, rtol=1e-11, atol=1e-12)
    for a, b in zip(one, other):
        assert [x is None for x in a["losses"]] == [x is None for x in b["losses"]]
        assert [x for x in a["losses"] if x] == pytest.approx([x for x in b["losses"] if x], rel=1e-11)
    assert not any(tmp_path.iterdir())  # of no use any more


def test_images_in_channels_last_order_and_bf16_come_back_as_they_were(tmp_path):
    for k, x in enumerate(
        [
            torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.randn(6, 5).bfloat16(),
        ]
    ):
        file = FeatureFile(tmp_path / f"features-{k}", 9)
        numbers = torch.tensor([8, 0, 3, 1, 2, 7])
        file.put(numbers, x)
        assert torch.equal(file.get(numbers), x) and file.get(numbers).stride() == x.stride()
        assert file.get(numbers).dtype == x.dtype
        assert FeatureFile(tmp_path / f"features-{k}", 9).there.nonzero().flatten().tolist() == [0, 1, 2, 3, 7, 8]
        assert not FeatureFile(tmp_path / f"features-{k}", 10).there.any()


def test_a_folder_that_cannot_be_or_is_full_is_a_sentence_and_leaves_no_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DamagedFile, match=r"cannot be written to .*another folder"):
            FeatureFile(folder / "features", 9).put(torch.tensor([0]), torch.randn(1, 3))

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DamagedFile, match=r"cannot be written to .*another folder"):
            fitted(trained := session(folder))
        assert trained.steps == 0  # nothing was trained for nothing
    with pytest.raises(InvalidChoice, match="cache=5 is no folder"):
        ul.credit.Greedy(cache=5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)  # writing to a mapping without room would end the process
    with pytest.raises(DamagedFile, match=r"No space left.*another folder"):
        FeatureFile(tmp_path / "room" / "features", 9).put(torch.tensor([0]), torch.randn(1, 3))
    assert not any((tmp_path / "room").iterdir())


def test_frozen_stages_run_only_for_batches_with_a_sample_that_is_new(tmp_path):
    watch, trained = Watch(), session(tmp_path)
    records = fitted(trained, callbacks=[watch])
    seen, expected = set(), []
    for epoch in range(3):  # batches of an epoch that must be computed whole, by the order of the data alone
        parts = [
            part for n in numbered(TRAIN, 12, epoch=epoch, seed=3, replica=0, shards=1, start=0) for part in n.split(6)
        ]
        expected.append(0)
        for part in parts:
            expected[-1] += not set(part.tolist()) <= seen
            seen |= set(part.tolist())
    assert expected[0] == 8 and 0 < expected[1] < 4  # (the case has what it is about)
    for phase in (1, 2):
        for epoch in range(3):
            found = watch.epochs[3 * phase + epoch]
            assert found[phase] == 8 and all(found.get(j, 0) == expected[epoch] for j in range(phase))
    sent = [record["bytes"].get("activation", 0) for record in records]
    assert sent[4] == sent[3] * expected[1] / 8 and sent[7] == sent[6] * expected[1] / 8


class StopAt(ul.callbacks.Callback):
    def __init__(self, steps):
        self._steps = steps

    def on_step(self, trainer, record):
        if trainer.steps == self._steps:
            raise KeyboardInterrupt


def stopped(tmp_path, steps=19):
    """A run that ended in the middle of an epoch of the second stage; its last checkpoint is older."""
    with pytest.raises(KeyboardInterrupt):
        fitted(session(tmp_path / "features"), checkpoint=tmp_path / "run", callbacks=[StopAt(steps)])


def go_on(tmp_path, watch, train=TRAIN):
    model = ul.cut(mlp(3, norm=True, dropout=0.2), 3, like=TRAIN.x[:4])
    again = ul.Trainer.resume(tmp_path / "run", model)
    fitted(again, train, callbacks=[watch])
    return again


def test_a_resumed_run_goes_on_with_what_is_there_bit_for_bit(tmp_path):
    whole = session(tmp_path / "whole")
    fitted(whole)
    stopped(tmp_path)
    watch = Watch()
    again = go_on(tmp_path, watch)
    odd = [name for name, x in state(whole).items() if not torch.equal(state(again)[name], x)]
    assert not odd and sum(epoch.get(0, 0) for epoch in watch.epochs[:2]) <= 3
    assert not any((tmp_path / "features").iterdir())


@pytest.mark.parametrize("harm", ["a row", "rows cut off", "no form", "other weights", "other data"])
def test_what_does_not_fit_is_made_anew(harm, tmp_path):
    stopped(tmp_path)
    (stem,) = {file.with_suffix("") for file in (tmp_path / "features").iterdir()}
    rows, form = stem.with_suffix(".rows"), stem.with_suffix(".json")
    if harm == "a row":
        kept = np.memmap(rows, np.uint8, "r+")
        kept[: json.loads(form.read_text())["width"] * 25] ^= 1
        kept.flush()
    elif harm == "rows cut off":
        rows.write_bytes(rows.read_bytes()[:-8])
    elif harm == "no form":
        form.write_text("{")
    elif harm == "other weights":
        for file in (stem.with_suffix(s) for s in (".rows", ".json", ".index")):
            file.rename(file.with_name(file.name.replace("-stage-1-", "-stage-1-0")))
    train = ul.data.from_tensors(TRAIN.x + (harm == "other data") * 1e-9, TRAIN.y)
    watch = Watch()
    again = go_on(tmp_path, watch, train)
    assert sum(epoch.get(0, 0) for epoch in watch.epochs[:2]) >= 5
    whole = session()
    fitted(whole)
    for name, x in state(whole).items():
        torch.testing.assert_close(state(again)[name], x, rtol=1e-5, atol=1e-6)


def test_a_row_damaged_while_training_is_a_sentence(tmp_path):
    trained = session(tmp_path)

    class Harm(ul.callbacks.Callback):
        def on_epoch(self, trainer, record):
            for rows in tmp_path.glob("*.rows"):
                kept = np.memmap(rows, np.uint8, "r+")
                kept[:] ^= 1

    with pytest.raises(DamagedFile, match=r"features of sample \d+ .* are damaged.*last checkpoint"):
        fitted(trained, callbacks=[Harm()])


def test_after_a_step_that_failed_the_stages_agree_again(tmp_path):
    trained, right = session(tmp_path), torch.nn.functional.cross_entropy

    class Poison(ul.callbacks.Callback):
        """The first micro-batch of step 15 fails, so the stage that is trained never sees the second one."""

        def on_step(self, trainer, record):
            if trainer.steps == 14:
                trainer.chains[0][1].loss = lambda output, y: right(output, y) * float("nan")

    with pytest.raises(ul.UnlockedError, match="is nan"):
        fitted(trained, callbacks=[Poison()])
    trained.chains[0][1].loss = right
    fitted(trained)
    assert trained.epoch == 9


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: fitted(session(d), ul.data.Domains([TRAIN])), "one data set of numbered samples"),
        (lambda d: fitted(session(d, regularisers=[ul.population.Regulariser(mixup=0.2)])), "without regularisers"),
        (lambda d: trainer_with_images(d), "without augmentation.*leave out 'flip'"),
        (lambda d: by_hand(session(d)), "call fit, or leave out cache"),
    ],
    ids=["domains", "regularisers", "augmentation", "by hand"],
)
def test_what_gives_other_features_in_every_epoch_is_refused(make, words, tmp_path):
    with pytest.raises(InvalidChoice, match=words):
        make(tmp_path)


def by_hand(trained):
    trained.phase = 1
    trained.step(TRAIN.x[:12], TRAIN.y[:12])


def trainer_with_images(cache):
    images = ul.data.from_tensors(
        torch.randint(256, (24, 1, 4, 4), dtype=torch.uint8), torch.arange(24) % 3, augment="flip"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    chain = ul.cut(model, 2, like=images.samples(torch.arange(2))[0])
    credit = ul.credit.Greedy(head="linear", budget=None, cache=str(cache))
    ul.Trainer(chain, credit=credit, optimizer=torch.optim.SGD).fit(images, 1, batch_size=12)


# ---- other worlds, and the command line -----------------------------------------------------------------------------------


def test_a_simulated_clock_charges_only_what_is_computed(tmp_path):
    seconds = {}
    for name, cache in {"plain": None, "cached": tmp_path}.items():
        world = Simulated(costs=unit(3, forward=[10, 1, 1]))  # plain: stage 0 is what the others wait for
        seconds[name] = [record["seconds"] for record in fitted(session(cache, world=world, accumulate=1))]
    plain, cached = seconds["plain"], seconds["cached"]
    assert cached[:3] == plain[:3] and cached[5] < plain[5] and cached[8] < plain[8]


def on_processes(cluster, cache):
    trained = session(cache, world=Distributed(cluster))
    records = fitted(trained)
    return told(records), {w.worker.stage: state(trained) for w in trained.weights}, [r["bytes"] for r in records]


def test_over_processes_equals_in_process_bit_for_bit(tmp_path):
    reference = session(tmp_path / "reference")
    records = fitted(reference)
    found = run_processes(on_processes, 3, tmp_path / "features")
    whole = state(reference)
    for said, stages, sent in found:
        assert said == told(records) and sent == [record["bytes"] for record in records]
        for j, kept in stages.items():
            assert all(torch.equal(kept[name], x) for name, x in whole.items() if name.startswith(f"0.{j}."))


def test_the_command_line_knows_folders_and_the_depths_of_heads():
    call = parse_call("greedy(cache=/tmp/some-where/features, head=mlp(depth=2))")
    made = make_credit(call, 4)
    assert made == ul.credit.Greedy(cache="/tmp/some-where/features", head=ul.heads.MLPHead(depth=2))
    assert parse_call(str(call)) == call and "head=mlp(depth=2)" in str(call)
    assert parse_call("greedy(cache='a=/b c')").options == (("cache", "a=/b c"),)
    deep = make_credit(parse_call("dgl(head=dgl-mlp(depth=1,reductions=3))"), 4).head
    assert deep == ul.heads.DGLMLPHead(depth=1, reductions=3)
    for text, words in {
        "dgl(head=mlp(depht=2))": "did you mean 'depth'",
        "dgl(head=mpl(depth=2))": "did you mean 'mlp'",
        "dgl(head=mlp(depth=J))": "give a number",
        "dgl(head=mlp(depth=deep))": "must be a whole number",
    }.items():
        with pytest.raises(InvalidChoice, match=words):
            make_credit(parse_call(text), 4)
